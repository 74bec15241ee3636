"""Families of models to test with: their tiny configurations, and which of them fast runs take."""

from collections.abc import Iterable
from typing import Any

import pytest

# Every family by its transformers model type, as small as its attention allows.
_COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA_LIKE = _COMMON | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE | {"query_pre_attn_scalar": 8},
    "gemma3_text": _LLAMA_LIKE | {"query_pre_attn_scalar": 8},
    "phi": _COMMON | {"intermediate_size": 64},
    "phi3": _LLAMA_LIKE,
    "gpt2": _COMMON,
    "gpt_neox": _COMMON | {"intermediate_size": 64},
    "opt": _COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": _COMMON | {"alibi": False},
    "mixtral": _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


# In a fast run these stand for all: rotary and learned positions, norms before and around a block, scaled embeddings.
FAST = ("llama", "qwen3", "gemma3_text", "gpt2")


def each_family(names: Iterable[str] = FAMILIES, *more: Any) -> list[Any]:
    """A test's parameters, (name, *more) for each family called so; those that are not in FAST are marked slow."""
    return [pytest.param(name, *more, marks=() if name in FAST else pytest.mark.slow) for name in names]
