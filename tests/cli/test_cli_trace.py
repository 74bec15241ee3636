"""kif trace, and the heat map that pages share."""

from dataclasses import replace

import pytest
import torch

from kif_cli.pages import heat, visible
from kif_cli.tracing import trace

PROMPT = "the capital of japan is a city"


@torch.no_grad()
def expected(tiny, capsule, prompt):
    """Scores in float64: at the first site on the bare states, at the second on those that the first left."""
    first, second = capsule.signatures
    ids = tiny.tokenizer(prompt, return_tensors="pt")["input_ids"]
    block = tiny.model.model.layers
    seen = []

    def score(x, s):
        v = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return v @ s.detector.double() + s.bias.double()

    def edit(module, args, output):
        x = output.double()
        seen.append(score(x[0], first))
        change = (x @ first.basis.double().T - first.target.double()) @ first.basis.double()
        return torch.where(seen[0][None, :, None] > 0, x - change, x).float()

    handles = [
        block[0].register_forward_hook(edit),
        block[1].register_forward_hook(lambda module, args, output: seen.append(score(output.double()[0], second))),
    ]
    tiny.model(ids)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def test_scores_are_those_that_decide(tiny, capsule):
    (found,) = trace(tiny.model, tiny.tokenizer, [capsule], [PROMPT])
    scores = torch.tensor([line.scores for line in found.lines], dtype=torch.float64)
    assert torch.allclose(scores, expected(tiny, capsule, PROMPT), atol=1e-4)
    assert [line.site for line in found.lines] == [0, 1]
    assert [t for t, fired in enumerate(found.fired) if fired] == [PROMPT.split().index("japan")]


def test_the_model_is_left_as_it_was(tiny, capsule):
    ids = tiny.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    before = tiny.model(ids).logits
    trace(tiny.model, tiny.tokenizer, [capsule], [PROMPT])
    assert torch.equal(tiny.model(ids).logits, before)
    assert not any("forward" in block.__dict__ for block in tiny.model.model.layers)


def test_two_capsules_keep_their_own_scores(tiny, capsule):
    first = capsule.signatures[0]
    one = replace(capsule, id="b", signatures=(first,))
    two = replace(capsule, id="a", signatures=(replace(first, bias=first.bias - 100),))
    (found,) = trace(tiny.model, tiny.tokenizer, [one, two], [PROMPT])
    assert [line.capsule for line in found.lines] == ["b", "a"]
    gaps = [high - low for high, low in zip(found.lines[0].scores, found.lines[1].scores, strict=True)]
    assert gaps == pytest.approx([100.0] * len(gaps), abs=1e-3)


def test_a_soft_gate_is_traced_relative_to_its_tau(tiny, capsule):
    first = capsule.signatures[0]
    soft = replace(capsule, signatures=(replace(first, gate="soft", k=2.0, tau=0.5),))
    hard = replace(capsule, signatures=(first,))
    (relative,), (plain,) = (trace(tiny.model, tiny.tokenizer, [c], [PROMPT]) for c in (soft, hard))
    assert relative.lines[0].scores == pytest.approx([s - 0.5 for s in plain.lines[0].scores])


def test_json_has_a_score_for_every_signature_and_token(kif, tiny, capsule_file):
    found = kif("trace", "-m", tiny.folder, "-c", capsule_file, PROMPT, "japan", "--json").json
    assert found["capsules"] == ["japan"]
    assert [t["prompt"] for t in found["traces"]] == [PROMPT, "japan"]
    for each in found["traces"]:
        assert [t["text"] for t in each["tokens"]] == each["prompt"].split()
        assert [t["fired"] for t in each["tokens"]] == [word == "japan" for word in each["prompt"].split()]
        assert all(len(s["scores"]) == len(each["tokens"]) for s in each["signatures"])


def test_colours_and_figures_on_the_terminal(kif, tiny, capsule_file):
    result = kif("trace", "-m", tiny.folder, "-c", capsule_file, PROMPT)
    assert result.exit_code == 0
    fires = [line for line in result.stdout.splitlines() if line.rstrip().endswith("fires")]
    assert len(fires) == 1
    assert fires[0].split()[0] == "japan"


def test_the_page_is_self_contained_and_escaped(kif, tiny, capsule_file, tmp_path):
    page = tmp_path / "trace.html"
    result = kif("trace", "-m", tiny.folder, "-c", capsule_file, "--html", page, "japan and <b> Ä")
    assert result.exit_code == 0
    text = page.read_text()
    assert "&lt;b&gt;" in text and "<b>Ä" not in text
    assert '<li class="fired"' in text
    assert "http" not in text.replace("http-equiv", "") and "<script" not in text
    assert page.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("where", ["nowhere/trace.html", "."])
def test_an_unwritable_page_is_refused_before_the_model_is_looked_for(refused, capsule_file, tmp_path, where):
    line = refused("trace", "-m", "/no/model", "-c", capsule_file, "--html", tmp_path / where, "x")
    assert "cannot write" in line


def test_a_trace_needs_a_capsule(refused):
    assert "--capsule" in refused("trace", "-m", "/no/model", "x")


def test_heat_says_which_tokens_are_near_the_decision(tiny, capsule):
    (found,) = trace(tiny.model, tiny.tokenizer, [capsule], [PROMPT])
    cells = heat(found)
    hot = max(cells["tokens"], key=lambda cell: cell["heat"])
    assert hot["text"] == "japan" and hot["fired"] and cells["count"] == 1
    assert all(0 <= cell["heat"] <= 1 for line in cells["lines"] for cell in line["cells"])


def test_white_space_tokens_are_visible():
    assert [visible(t) for t in (" Japan", "\n", " ", "", "\t")] == ["Japan", "↵", "␣", "∅", "⇥"]
