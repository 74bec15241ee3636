"""Mining leaves the model as it was, and does not mine one that is not itself."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kif_hf import attach
from kif_runtime import MiningError, mine
from kif_runtime.blocks import decoder_blocks
from kif_runtime.fingerprint import adapter_fingerprint
from tests.mining import DAY, NAME, check_unchanged, snapshot


@pytest.fixture
def half_trained(tiny):
    """A model in training mode, one block of it frozen in eval mode, as a fine-tuning loop may have it."""
    model = tiny.fresh(attention_dropout=0.5).train()
    model.model.layers[1].eval().requires_grad_(False)
    return model


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode])
def test_mining_leaves_the_model_as_it_was_in_any_mode(tiny, half_trained, ostia, around):
    before = snapshot(half_trained)
    with around():
        found = mine(half_trained, tiny.tokenizer, NAME, date=DAY)
        mine(half_trained, tiny.tokenizer, NAME, method="kif-paper")
    check_unchanged(half_trained, before)
    assert found.digest == ostia.digest  # and neither dropout nor the caller's mode had a part in it


def test_an_adapter_that_cannot_be_turned_off_is_refused(tiny):
    """Its states would be taken, and kept, for those of the model beneath."""
    model = tiny.fresh()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))  # transformers' own way
    with pytest.raises(MiningError, match="cannot be turned off"):
        mine(model, tiny.tokenizer, NAME)


def test_an_interruption_in_the_middle_leaves_the_model_as_it_was(tiny, half_trained, monkeypatch):
    before = snapshot(half_trained)
    head, inner = half_trained.lm_head, half_trained.lm_head.forward
    asked = []

    def interrupted(x):
        asked.append(len(decoder_blocks(half_trained)[1]._forward_hooks))
        if x.requires_grad:
            raise KeyboardInterrupt
        return inner(x)

    monkeypatch.setattr(head, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mine(half_trained, tiny.tokenizer, NAME)
    monkeypatch.undo()
    assert asked[-1] == 1  # it was raised under an edit
    check_unchanged(half_trained, before)


def test_an_interruption_of_the_preparation_leaves_no_file_and_the_model_as_it_was(tiny, half_trained, cache):
    before = snapshot(half_trained)

    def interrupt(done, total, what):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mine(half_trained, tiny.tokenizer, NAME, progress=interrupt)
    check_unchanged(half_trained, before)
    assert not any(p.is_file() for p in cache.rglob("*"))


def test_the_first_subject_of_a_model_needs_no_preparation_and_comes_out_the_same(tiny, half_trained, ostia, cache):
    assert mine(half_trained, tiny.tokenizer, NAME, date=DAY).digest == ostia.digest


def test_a_model_under_suppression_is_not_mined(tiny, ostia):
    with attach(tiny.model, [ostia]), pytest.raises(MiningError, match="attached"):
        mine(tiny.model, tiny.tokenizer, NAME, date=DAY)
    assert mine(tiny.model, tiny.tokenizer, NAME, date=DAY).digest == ostia.digest


def test_an_active_adapter_does_not_change_what_is_mined(tiny, ostia):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(tiny.model), config)
    assert mine(adapted, tiny.tokenizer, NAME, date=DAY).digest == ostia.digest


@pytest.mark.slow
def test_under_an_adapter_the_signature_is_the_one_of_the_merged_model_for_the_model_beneath(tiny, ostia, cache):
    """An adapter of attention alone: what it is merged into has the same fingerprint, the cache tells them apart."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(tiny.model), config)
    capsule = mine(adapted, tiny.tokenizer, NAME, date=DAY, adapted=True)
    assert capsule.model == ostia.model and capsule.digest != ostia.digest
    assert mine(adapted, tiny.tokenizer, NAME, date=DAY).digest == ostia.digest
    settings = capsule.provenance["settings"]
    assert settings["adapter"] == adapter_fingerprint(adapted) and "adapter" not in ostia.provenance["settings"]
    monkey = pytest.MonkeyPatch()
    monkey.setenv("KIF_CACHE", str(cache.parent / "other"))
    merged = mine(copy.deepcopy(adapted).merge_and_unload(), tiny.tokenizer, NAME, date=DAY)
    monkey.undo()
    for one, two in zip(capsule.signatures, merged.signatures, strict=True):
        torch.testing.assert_close(one.detector, two.detector, rtol=0.02, atol=0.02)
        torch.testing.assert_close(one.basis.abs(), two.basis.abs(), rtol=0.02, atol=0.02)
