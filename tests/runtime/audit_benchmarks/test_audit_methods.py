"""The methods that the audit compares: each does what it is named for. Pooling audits of several subjects, by hand."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from evaluating import capsule_for, states
from evaluating import tokenizer as words

from kif_cli.pages import eval_page
from kif_cli.results import SCHEMA
from kif_runtime.evaluation.attacks.weights import edited
from kif_runtime.evaluation.outputs import go_on, read
from kif_runtime.mining import prepare
from kif_runtime.mining.reading import Reader
from kif_runtime.mining.subject import find_subject
from tests.mining import NAME, check_unchanged, snapshot
from tests.runtime.mining.conftest import ostia, tiny  # noqa: F401


def test_an_instruction_is_read_before_every_sequence(script, tiny_model):
    model = tiny_model("llama", initializer_range=0.3)
    was = snapshot(model)
    said, prompts = (5, 9, 77, 30), [(3, 4, 5), (7, 8, 9, 10, 11, 12), (20,)]
    wanted = read(model, [(*said, *prompt) for prompt in prompts])
    plain = SimpleNamespace(eos_token_id=2, decode=lambda ids, skip_special_tokens: str(ids))
    answers = go_on(model, plain, [(*said, *prompt) for prompt in prompts], 8)
    with script("erasures").instructed(model, said):
        for one, other in zip(read(model, prompts), wanted, strict=True):
            torch.testing.assert_close(one.log_probs, other.log_probs)
            torch.testing.assert_close(one.blocks, other.blocks)
        assert [one.ids for one in go_on(model, plain, prompts, 8)] == [one.ids for one in answers]
    for one, other in zip(read(model, prompts), wanted, strict=True):
        assert (one.log_probs - other.log_probs).abs().max() > 0.1
    check_unchanged(model, was)


def test_a_projection_takes_out_what_the_capsule_spans_and_nothing_else(script, tiny_model):
    model = tiny_model("llama", vocab_size=len(words()))
    capsule = capsule_for(model, "Arland", "arland")
    basis = capsule.signatures[0].basis.double()
    ids = torch.randint(3, len(words()), (4, 9), generator=torch.Generator().manual_seed(0))
    was = states(model, 1, ids)
    with edited(model, script("erasures").projections(capsule)):
        found = states(model, 1, ids)
    assert (was @ basis.T).abs().max() > 0.01
    assert (found @ basis.T).abs().max() < 1e-5
    torch.testing.assert_close(found, was - (was @ basis.T) @ basis, atol=1e-5, rtol=0)


def test_leace_leaves_the_name_and_other_tokens_with_one_mean(script, tiny, ostia):  # noqa: F811
    """Equal means of the two classes are the theorem's condition for no linear classifier to tell them apart."""
    pytest.importorskip("concept_erasure", reason="LEACE is taken from its authors' package")
    ((site, edit),) = script("erasures").leace(tiny.model, tiny.tokenizer, NAME, ostia).items()
    control, reader = prepare(tiny.model, tiny.tokenizer, site=site), Reader(tiny.model, tiny.tokenizer)
    subject = find_subject(reader, control, (NAME,), ostia.calibration["kind"], None, None)
    rows = subject.read(reader, site)
    own = torch.cat([x[[i for i in span if i > 0]] for x, span in zip(rows, subject.spans, strict=True)])
    silent = [text for text in control.texts if NAME.casefold() not in text.casefold()]
    others = torch.cat([x[1:] for x in reader.states([*subject.near, *silent[:: script("erasures").EVERY]], site)])
    apart = (own.mean(0) - others.mean(0)).norm()
    left = (edit(own).mean(0) - edit(others).mean(0)).norm()
    assert left < 1e-3 * apart
    assert (edit(others) - others).norm() < 0.5 * others.norm()  # and little else is moved


def test_an_unknown_method_is_refused(script, tiny_model):
    model = tiny_model("llama", vocab_size=len(words()))
    erasures = script("erasures")
    one = erasures.Erasures(model, words(), "Arland", capsule_for(model, "Arland", "arland"), Path(), {}, 0)
    with pytest.raises(Exception, match="unknown method 'magic'"):
        one.state("magic")


# -- pooling


def figure(after, count):
    return {"what": "it", "after": after, "interval": None, "before": 1.0, "reference": None, "level": None} | {
        "count": count
    }


def rate(hits, tried):
    return {"tried": tried, "success": hits / tried, "interval": [0.0, 1.0]}


def results(verdict, kept, attack, ratio):
    """One subject's results, as far as pooling looks at them."""
    fact = {"relation": "", "kind": "place", "prompt": None, "answer": None, "first": False}
    facts = [fact | {"subject": "subject 1", "before": 0.8, "after": 0.1, "prior": 0.0, "kept": k} for k in kept]
    mean = sum(kept) / len(kept)
    summary = {"facts": len(kept), "subjects": 1, "mean": mean, "beyond": 0.5}
    shared = {"greedy": {"before": 1.0, "after": mean}, "rank": {"before": 1.0, "after": 9.0}}
    question = {"question": "direct", "made": "from the file", "asked": len(kept), "known": len(kept), "kept": summary}
    tried = {"name": "prefill", "access": "prompt", "budget": "1 queries", "control": rate(2, 2), "reference": None}
    return {
        "format": 2, "kif": "0", "date": "2030-01-01", "names": False, "model": "m", "adapter": None,
        "erased_model": "x", "reference": None, "max_false_fire": None, "form": "bare", "least_excess": 0.15,
        "profile": "quick", "seed": 0, "states": {"before": {"removable": False}, "after": {"removable": False}},
        "seconds": 10.0, "processor_seconds": 9.0, "capsules": [], "forwards": {"asked": 10, "saved": 4},
        "suites": ["facts", "attacks"], "verdict": {"verdict": verdict}, "facts": facts,
        "figures": {"kept": figure(mean, len(kept)), "perplexity": figure(ratio, 500)},
        "questions": [question | shared], "attacks": {"attacks": [tried | rate(*attack)]},
    }  # fmt: skip


def test_audits_of_several_subjects_are_pooled_as_by_hand(script):
    found = [
        results("leaking", [1.0, 0.4, 0.4], (3, 3), 1.2),
        results("suppressed", [0.2], (0, 1), 1.0),
        results("leaking", [0.0, 0.0], (1, 2), 1.1),
    ]
    pool = script("audit_pool").pooled(found)
    assert pool["verdicts"] == {"leaking": 2, "suppressed": 1}
    assert pool["kept"]["facts"] == 6 and pool["kept"]["subjects"] == 3
    assert pool["kept"]["mean"] == pool["figures"]["kept"]["after"] == pytest.approx(2.0 / 6)
    assert pool["figures"]["kept"]["interval"] == pytest.approx(pool["kept"]["interval"])  # each resamples subjects
    assert pool["figures"]["perplexity"]["after"] == pytest.approx(1.1)  # a subject each, whatever its facts
    (question,) = pool["questions"]
    assert question["known"] == 6 and question["kept"]["mean"] == pytest.approx(2.0 / 6)
    (attack,) = pool["attacks"]["attacks"]
    assert (attack["tried"], attack["success"]) == (6, pytest.approx(4 / 6))
    assert attack["control"]["tried"] == 6 and attack["reference"] is None
    assert pool["forwards"] == {"asked": 30, "saved": 12} and pool["seconds"] == 30.0
    jsonschema.validate(json.loads(json.dumps(pool)), json.loads(SCHEMA.read_text()))
    page = eval_page(pool, [("another", pool)], label="this method")
    assert "3 audits: 2 leaking, 1 suppressed." in page and ">this method</th>" in page and ">another</th>" in page


@pytest.mark.slow
def test_the_comparison_goes_on_where_it_was_and_writes_a_page(
    script,
    tiny,  # noqa: F811
    ostia,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    comparing, facts, text = script("audit_methods"), tmp_path / "facts.jsonl", tmp_path / "text.txt"
    others = [e.name for e in tiny.corpus.entities if e.kind == "place"][:8]
    rows = [
        {"subject": name, "prompt": f"{start} {name} is", "answer": answer, "prior_subjects": others[:2]}
        for name in (NAME, *others)
        for start, answer in (("The river of", "old"), ("The mayor of", "great"))
    ]
    facts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text.write_text(" ".join(tiny.corpus.passages))
    (tmp_path / "except").write_text("\n".join(others))
    monkeypatch.setattr(script("common"), "load", lambda args: (tiny.model, tiny.tokenizer))
    asked = ["--facts", facts, "--text", text, "--out", tmp_path / "out", "--capsules", tmp_path / "capsules"]
    asked += ["--count", 1, "--except", tmp_path / "except", "--least-excess", 1e-9, "--neighbours", 6]
    asked += [part for method in ("untouched", "heretic", "KIF gate") for part in ("--only", method)]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, asked)])
    was = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    comparing.main()
    now = tiny.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in was.items())
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[3:6]] == ["untouched", "heretic", "KIF"]
    kept = {m: json.loads((tmp_path / "out" / m / "results.json").read_text()) for m in ("untouched", "KIF gate")}
    assert kept["untouched"]["kept"]["mean"] == 1.0 and kept["untouched"]["figures"]["neighbours"]["after"] == 0.0
    assert kept["KIF gate"]["states"]["after"]["removable"] and NAME not in json.dumps(kept)
    assert "Side by side" in (tmp_path / "out" / "report.html").read_text()
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "audits").iterdir()}
    assert len(times) == 3
    comparing.main()
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "audits").iterdir()}
    assert capsys.readouterr().out == shown
