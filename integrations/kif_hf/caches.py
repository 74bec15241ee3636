"""Whose states a `past_key_values` holds: a cache computed with capsules attached carries the sets it was made under.

The tag is an attribute of the cache, so it follows the object through generate, crop, reset, copies and pickles. A
cache with states but without a tag was computed without the capsules. Not seen: rows of different sets reordered by
hand, and a cache that was cropped and then refilled, up to its former length at most, without the capsules.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from kif_runtime.errors import RequestError

_SETS, _TOKENS = "_kif_sets", "_kif_tokens"
_NAMES = ("past_key_values", "cache_params", "state", "mems")  # as transformers.generation calls them

Key = tuple[int, ...]


def given(arguments: dict[str, Any]) -> Cache | None:
    """The cache among a forward's arguments. Raises RequestError for states in a form that cannot carry a tag."""
    if arguments.get("cache") is not None:  # so transformers hands over the pages of its continuous batching
        raise RequestError("capsules do not apply under continuous batching; call generate(), not generate_batch()")
    for name in _NAMES:
        cache = arguments.get(name)
        if isinstance(cache, Cache):
            return cache
        if cache is not None:
            raise RequestError(f"{name} is a {type(cache).__name__}, which KIF cannot check; pass a transformers Cache")
    return None


def refuse_batching(model: nn.Module) -> None:
    """Raise RequestError where `model` keeps a manager of continuous batching: its graphs run no forward to check."""
    if getattr(model, "_cached_continuous_batching_manager", None) is not None:
        raise RequestError(
            "this model keeps states and graphs of continuous batching, made without the capsules; "
            "call destroy_cached_continuous_batching_manager() first"
        )


def returned(output: Any) -> Cache | None:
    """The cache among a forward's results, whatever form they have."""
    values = output if isinstance(output, tuple) else [getattr(output, name, None) for name in _NAMES]
    return next((value for value in values if isinstance(value, Cache)), None)


def check(cache: Cache, key: Key) -> bool:
    """Whether `cache` holds states made under `key`; False for an empty one. Raises RequestError for any other."""
    made_under = getattr(cache, _SETS, None)
    if made_under == key:
        tokens, known = _tokens(cache), getattr(cache, _TOKENS)
        if tokens is not None and known is not None and tokens > known:
            raise RequestError(
                "past_key_values holds tokens added by a forward without these capsules, or by one that failed; "
                "pass past_key_values=None, or crop it"
            )
        return True
    if int(cache.get_seq_length()) == 0:
        return False
    if made_under is None:
        raise RequestError(
            "past_key_values was computed without the capsules, or before they were attached; pass past_key_values=None"
        )
    raise RequestError("past_key_values was computed under another capsule set; use that set or past_key_values=None")


def tag(cache: Cache, key: Key) -> None:
    """Mark all states in `cache` as made under `key`."""
    setattr(cache, _SETS, key)
    setattr(cache, _TOKENS, _tokens(cache))


def _tokens(cache: Cache) -> int | None:
    """How many tokens the cache holds; None while tracing a graph, or where only the device knows (a static cache)."""
    if torch.compiler.is_compiling():
        return None
    tokens = cache.get_seq_length()
    if isinstance(tokens, Tensor):
        return int(tokens) if tokens.device.type == "cpu" else None
    return tokens
