"""Quantise and dequantise the weights, as deployment does: erasures of small steps can round away.

Source of the attack: Zhang et al., Catastrophic failure of LLM unlearning via quantization (arXiv 2410.16454); of NF4:
Dettmers et al., QLoRA (arXiv 2305.14314), whose code book is computed here from its definition.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor, nn

from ...blocks import decoder_blocks
from ...errors import KifError, ModelError
from ..facts import Fact
from .outcome import Outcome, ask, asked_outcome
from .weights import weights_kept

GROUPS = {"int8": 128, "int4": 128, "nf4": 64}
_OFFSET = 0.9677083  # QLoRA's: the mean of 1 − 1/(2·15) and 1 − 1/(2·16)


def quantised_answers(model: Any, tokenizer: Any, facts: Sequence[Fact], *, scheme: str = "nf4") -> Outcome:
    """The facts asked of the model after a round trip through int8, int4 (round to nearest) or NF4. An adapter is
    merged first, as it would be for deployment."""
    with quantised(model, scheme):
        asked = ask(model, tokenizer, facts)
    return asked_outcome(f"quantised, {scheme}", {"bits": 8 if scheme == "int8" else 4}, facts, asked)


@contextmanager
def quantised(model: Any, scheme: str) -> Iterator[None]:
    """Inside the block the weights of all linear layers in the decoder blocks are what `round_trip` makes of them.

    Embeddings, norms, biases and the output head stay as they are, which is the custom. Raises KifError for an unknown
    scheme, ModelError where the blocks have no linear layers.
    """
    if scheme not in GROUPS:
        raise KifError(f"unknown scheme {scheme!r}; use one of {', '.join(GROUPS)}")
    with weights_kept(model), _merged(model):
        layers = _layers(model)
        if not layers:
            raise ModelError("the decoder blocks have no plain linear layers; this model cannot be quantised here")
        with torch.no_grad():
            for layer in layers:
                layer.weight.copy_(round_trip(layer.weight, scheme))
        yield


def round_trip(weight: Tensor, scheme: str) -> Tensor:
    """`weight` [out, in] quantised and dequantised, dtype kept; in groups of GROUPS[scheme] inputs with one scale each,
    the last group of a row shorter where it does not divide. int8 and int4: whole multiples of max|w| / (2^(b−1) − 1).
    NF4: the nearest of 16 levels times max|w|."""
    size = GROUPS[scheme]
    whole = weight.shape[1] // size * size
    groups, rest = weight[:, :whole].float().unflatten(1, (-1, size)), weight[:, whole:].float()
    parts = [_round_groups(groups, scheme).flatten(1)] + ([_round_groups(rest, scheme)] if rest.numel() else [])
    return torch.cat(parts, 1).to(weight.dtype)


def _round_groups(groups: Tensor, scheme: str) -> Tensor:
    """groups [..., group]."""
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if scheme == "nf4":
        levels = nf4_levels().to(groups)
        scaled, nearest = groups / largest, torch.zeros(groups.shape, dtype=torch.int32, device=groups.device)
        for between in ((levels[1:] + levels[:-1]) / 2).tolist():  # faster than bucketize
            nearest += scaled > between
        return levels[nearest] * largest
    top = 127 if scheme == "int8" else 7
    return (groups / largest * top).round().clamp(-top, top) / top * largest


@cache
def nf4_levels() -> Tensor:
    """[16] fp32: quantiles of the normal distribution, 8 above and 7 below zero and zero itself, scaled to [−1, 1]."""
    above, below = norm.ppf(np.linspace(_OFFSET, 0.5, 9)[:-1]), -norm.ppf(np.linspace(_OFFSET, 0.5, 8)[:-1])
    levels = torch.tensor([*above, 0.0, *below]).sort().values
    return (levels / levels.max()).float()


@contextmanager
def _merged(model: Any) -> Iterator[None]:
    """A PEFT adapter that is on is added to the weights it adapts; their bits come back by `weights_kept`."""
    adapted = [m for m in model.modules() if hasattr(m, "lora_A")]
    if not adapted or any(layer.disable_adapters for layer in adapted):
        yield
        return
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


def _layers(model: Any) -> list[nn.Linear]:
    """The linear layers of the decoder blocks; the two halves of a LoRA are none of the model's own."""
    halves = {
        id(half)
        for module in model.modules()
        for name in ("lora_A", "lora_B")
        for half in getattr(module, name, nn.ModuleDict()).values()
    }
    return [m for m in decoder_blocks(model).modules() if type(m) is nn.Linear and id(m) not in halves]
