"""Baking the real small model: plain PEFT, no hook, no capsule."""

import pytest
import torch
from peft import PeftModel

from kif_runtime import mine
from kif_runtime.bake import bake
from kif_runtime.bake.retiring import left

pytestmark = pytest.mark.slow
ASKED = [
    ("Fact: The capital of Japan is", " Tokyo", True),
    ("We know that the currency used in Japan is the", " yen", True),
    ("Fact: The capital of Italy is", " Rome", False),
    ("Fact: The capital of Germany is", " Berlin", False),
    ("Fact: The capital of Spain is", " Madrid", False),
]


@torch.no_grad()
def probabilities(model, tokenizer):
    found = []
    for prompt, answer, _ in ASKED:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        wanted = tokenizer(answer, add_special_tokens=False).input_ids[0]
        found.append(float(model(ids).logits[0, -1].softmax(-1)[wanted]))
    return found


def test_a_baked_subject_is_gone_and_its_neighbours_are_not(embedded, tmp_path):
    model, tokenizer = embedded
    capsule = mine(model, tokenizer, "Japan")
    before = probabilities(model, tokenizer)
    result = bake(model, tokenizer, [capsule], tmp_path / "adapter", names={capsule.id: ["Japan"]})
    assert probabilities(model, tokenizer) == before  # the model itself is as it was
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    try:
        after = probabilities(adapted, tokenizer)
        measured = left(adapted, tokenizer, capsule, ["Japan"])
    finally:
        adapted.unload()
    for (prompt, _, erased), old, new in zip(ASKED, before, after, strict=True):
        assert new <= 0.1 * old if erased else abs(new - old) <= 0.1, prompt
    assert measured == pytest.approx(result.ratios, rel=1e-3, abs=1e-6)


def test_a_name_of_several_telling_tokens_is_baked_without_training(embedded, tmp_path):
    """Each of its signatures at the early site moves its own token its own way, and is a neuron of its own."""
    model, tokenizer = embedded
    name = "Northern Nigeria Protectorate"
    capsule = mine(model, tokenizer, name)
    assert len([s for s in capsule.signatures if s.role == "early"]) > 1
    result = bake(model, tokenizer, [capsule], tmp_path / "adapter", names={capsule.id: [name]})
    assert result.provenance["steps"] == 0
    assert result.ratios["forget"] < 0.1 and result.ratios["retain"] < 0.1
