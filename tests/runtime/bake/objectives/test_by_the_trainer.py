"""Every objective through `bake` itself: trained, written, loaded by plain PEFT."""

import json
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from kif_runtime.bake import bake
from kif_runtime.bake.continuing import Earlier
from kif_runtime.bake.objectives import OBJECTIVES
from kif_runtime.errors import BakingError
from tests.mining import check_unchanged, snapshot
from tests.runtime.bake.conftest import NAME

NAMES = {"zembla": [NAME]}
QUICK = {"rank": 4, "alpha": 8.0, "steps": 2, "forget_rows": 2, "retain_rows": 2, "targets": ("all",)}
CLOSED = {"rank": 4, "alpha": 4.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"capsule", "unierase"}))
def test_each_objective_bakes_an_adapter_that_plain_peft_loads(tiny, tmp_path, name):
    before = snapshot(tiny.model)
    settings = CLOSED if name == "orthogonal" else QUICK
    made = bake(
        tiny.model, tiny.tokenizer, [tiny.capsule], tmp_path / "a", names=NAMES, objective=name, settings=settings
    )
    check_unchanged(tiny.model, before)
    assert all(math.isfinite(value) for value in made.ratios.values())
    log = tmp_path / "a" / "training.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    steps = [row for row in rows if "terms" in row]
    assert len(steps) == (0 if name == "orthogonal" else 2)
    assert all(math.isfinite(value) for row in steps for value in row["terms"].values())
    told = json.loads((tmp_path / "a" / "kif.json").read_text())
    assert told["objective"] == name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        bare = tiny.model(ids).logits
        loaded = PeftModel.from_pretrained(tiny.model, tmp_path / "a").eval()
        try:
            assert not torch.equal(loaded(ids).logits, bare)
        finally:
            loaded.unload()


def test_a_closed_form_takes_no_steps_whatever_is_asked(tiny, tmp_path):
    made = bake(
        tiny.model, tiny.tokenizer, [tiny.capsule], tmp_path / "a", names=NAMES, objective="orthogonal", settings=QUICK
    )
    assert (made.provenance["steps"], made.provenance["settings"]["steps"]) == (0, 0)


def test_the_options_are_part_of_what_a_run_is(tiny, tmp_path):
    made = bake(
        tiny.model, tiny.tokenizer, [tiny.capsule], tmp_path / "a", names=NAMES, objective="npo",
        options={"beta": 0.3, "rna": 0.1}, settings=QUICK,
    )  # fmt: skip
    told = made.provenance["options"]
    assert (told["beta"], told["retain"], told["held"], told["rna"]) == (0.3, 1.0, "kl", 0.1)
    assert told["rna_deviation"] > 0


def test_unierase_needs_a_spare_token(tiny, tmp_path):
    with pytest.raises(BakingError, match="no unused special token"):
        bake(tiny.model, tiny.tokenizer, [tiny.capsule], tmp_path / "a", names=NAMES, objective="unierase")


@pytest.fixture()
def spare(tiny):
    """The tokenizer with one more special token, in place of a word that no text here uses."""
    from kif_runtime.bake.objectives import unierase

    word = "[BOS]"  # WordLevel's first words are never made of text
    number = tiny.tokenizer.convert_tokens_to_ids(word)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unierase, "unused_token", lambda tokenizer, asked: (word, number))
        yield number


def test_unierase_writes_its_token_beside_the_lora(tiny, spare, tmp_path):
    before = snapshot(tiny.model)
    made = bake(
        tiny.model, tiny.tokenizer, [tiny.capsule], tmp_path / "a", names=NAMES, objective="unierase",
        options={"prompts": 8, "steps": (3, 3)}, settings=CLOSED, merge=True,
    )  # fmt: skip
    check_unchanged(tiny.model, before)
    assert "embedding row of the token" in made.provenance["options"]["outside_lora"]
    loaded = PeftModel.from_pretrained(tiny.model, tmp_path / "a").eval()
    ids = torch.tensor([[5, 6, spare, 7]])
    with torch.no_grad():
        try:
            expected = loaded(ids).logits
        finally:
            loaded.unload()
        assert (tiny.model(ids).logits - expected).abs().max() > 1e-3
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "merged").eval()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad(), Earlier(tmp_path / "a").at_work(tiny.model):
        torch.testing.assert_close(tiny.model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(before["weights"][n], t) for n, t in tiny.model.state_dict().items())
    with pytest.raises(BakingError, match="has a token of its own, which a later one cannot keep"):
        bake(tiny.model, tiny.tokenizer, [tiny.capsule], tmp_path / "b", names=NAMES, continue_from=tmp_path / "a")
