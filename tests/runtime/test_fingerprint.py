"""A fingerprint names the weights, not the form they come in."""

import hashlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from kif_runtime import ModelError
from kif_runtime.fingerprint import checkpoint_fingerprint, fingerprint


def reload(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def test_is_the_documented_hash(tiny_model):
    """Written out once more, by hand, for Llama."""
    model = tiny_model("llama", vocab_size=1500, num_hidden_layers=6)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
    }
    state = hashlib.sha256(json.dumps(shape).encode())
    pieces = {"embedding": model.model.embed_tokens.weight[:1024]}
    pieces |= {f"down.{n}": model.model.layers[n].mlp.down_proj.weight for n in (0, 4)}
    for label, weight in pieces.items():
        bits = weight.detach().bfloat16().view(torch.int16).numpy()
        state.update(f"{label}[{weight.shape[0]}, {weight.shape[1]}]".encode() + bits.astype("<i2").tobytes())
    assert fingerprint(model) == state.hexdigest()


def test_dtype_sharding_and_place_do_not_matter(family, tiny_model, tmp_path):
    model = tiny_model(
        family, hidden_size=64, vocab_size=512, **({"word_embed_proj_dim": 64} if family == "opt" else {})
    )
    wanted = fingerprint(model)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in (tmp_path / "whole", tmp_path / "shards"):
        assert checkpoint_fingerprint(folder) == wanted
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert fingerprint(reload(folder, dtype)) == wanted, (folder.name, dtype)
    assert fingerprint(tiny_model(family, seed=1)) != wanted


def test_weights_that_bf16_cannot_hold_survive_fp16(tiny_model, tmp_path):
    """fp32 → fp16 → bf16 rounds twice and can miss; the checkpoint is read instead."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] = 1 + 2**-8 + 2**-14  # up in bf16, but fp16 drops the 2**-14: a tie, down
    direct = model.model.embed_tokens.weight[3, 3]
    assert direct.half().bfloat16() != direct.bfloat16()
    model.save_pretrained(tmp_path)
    assert fingerprint(reload(tmp_path, torch.float16)) == fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_altered_in_memory_differ(tiny_model, tmp_path, dtype):
    tiny_model("llama").save_pretrained(tmp_path)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        model = reload(tmp_path, dtype)
        before = fingerprint(model)
        model.get_parameter(name).data[5] += 0.25
        assert fingerprint(model) != before, name


def test_an_attached_adapter_does_not_count_and_a_merged_one_does(tiny_model):
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    before = fingerprint(model)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    assert fingerprint(wrapped) == before
    assert fingerprint(wrapped.merge_and_unload()) != before


def test_more_rows_in_the_vocabulary_do_not_matter_but_shapes_do(tiny_model):
    model = tiny_model("llama", vocab_size=1100)
    before = fingerprint(model)
    model.resize_token_embeddings(1164)
    assert fingerprint(model) == before
    model.config.num_attention_heads = 2
    assert fingerprint(model) != before


def test_unknown_architectures_and_folders_are_refused(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.model.embed = model.model.embed_tokens
    del model.model.embed_tokens
    with pytest.raises(ModelError, match="token embedding"):
        fingerprint(model)
    with pytest.raises(ModelError, match="Hugging Face"):
        fingerprint(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError) as refused:
        checkpoint_fingerprint(tmp_path)
    assert "\n" not in str(refused.value)


def test_quantised_weights_without_a_checkpoint_are_refused(tiny_model):
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.down_proj
    weight.weight = torch.nn.Parameter(weight.weight.detach().mul(50).to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        fingerprint(model)
