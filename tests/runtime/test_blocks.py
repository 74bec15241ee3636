"""Decoder blocks are found by structure, or the model is refused."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from kif_runtime import ModelError
from kif_runtime.blocks import decoder_blocks, width

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


def hidden_states(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """The inputs of every block and of the final norm, as transformers itself records them."""
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states


def test_block_outputs_are_the_residual_stream(family, tiny_model):
    """Block l's output is what transformers records as hidden state l + 1 (its last one is normed, so left out)."""
    model = tiny_model(family)
    blocks = decoder_blocks(model)
    assert len(blocks) == 4
    seen = []
    hooks = [
        b.register_forward_hook(lambda m, a, out: seen.append(out if torch.is_tensor(out) else out[0])) for b in blocks
    ]
    recorded = hidden_states(model, torch.tensor([[3, 4, 5, 6, 7]]))
    for hook in hooks:
        hook.remove()
    assert len(seen) == 4
    for ours, theirs in zip(seen[:-1], recorded[1:-1], strict=True):
        assert torch.equal(ours, theirs)
        assert ours.shape[-1] == width(model)


def test_wrappers_are_looked_through(tiny_model):
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    blocks = decoder_blocks(model)
    compiled = torch.compile(model)  # compiles nothing until it is called
    assert decoder_blocks(compiled) is blocks
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert decoder_blocks(wrapped) is blocks
    assert width(wrapped) == 32


def test_the_bare_decoder_without_a_head_is_fine(tiny_model):
    model = tiny_model("qwen2")
    assert decoder_blocks(model.model) is decoder_blocks(model)


@pytest.mark.parametrize(
    ("family", "auto"),
    [("bert", AutoModel), ("bert", AutoModelForMaskedLM), ("roberta", AutoModel), ("modernbert", AutoModel)],
)
def test_encoders_are_refused(family, auto):
    special = dict.fromkeys((f"{t}_token_id" for t in ("pad", "bos", "eos", "cls", "sep")), 1)
    model = auto.from_config(AutoConfig.for_model(family, **SMALL | special))
    with pytest.raises(ModelError, match="encoder") as refused:
        decoder_blocks(model)
    assert "\n" not in str(refused.value)


def test_distilbert_is_refused():
    config = AutoConfig.for_model("distilbert", vocab_size=64, dim=32, n_layers=3, n_heads=4, hidden_dim=64)
    with pytest.raises(ModelError, match="encoder"):
        decoder_blocks(AutoModel.from_config(config))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoder_models_are_refused(family):
    sizes = {
        "t5": {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4},
        "bart": {"vocab_size": 64, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3}
        | {
            f"{side}_{part}": n
            for side in ("encoder", "decoder")
            for part, n in (("ffn_dim", 64), ("attention_heads", 4))
        },
    }
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **sizes[family]))
    with pytest.raises(ModelError, match="encoder-decoder"):
        decoder_blocks(model)


def test_two_lists_that_could_be_it_are_refused(tiny_model):
    model = tiny_model("llama")
    model.twin = copy.deepcopy(decoder_blocks(model))
    with pytest.raises(ModelError, match="several lists"):
        decoder_blocks(model)


def test_lists_of_plain_layers_are_no_blocks(tiny_model):
    model = tiny_model("llama")
    model.scales = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    assert decoder_blocks(model) is model.model.layers


def test_models_without_such_a_list_are_refused(tiny_model):
    model = tiny_model("llama")
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(ModelError, match="has no list of 4 decoder blocks"):
        decoder_blocks(model)
    for other in (nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])):
        with pytest.raises(ModelError, match="Hugging Face"):
            decoder_blocks(other)
        with pytest.raises(ModelError, match="Hugging Face"):
            width(other)


def test_only_the_language_part_of_a_multimodal_model_counts():
    text = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForImageTextToText.from_config(config)
    assert decoder_blocks(model) is model.model.language_model.layers
