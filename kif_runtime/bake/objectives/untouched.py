"""What objectives ask of the untouched model before the first step."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..examples import Batch, Example, collate
from ..passes import Passes
from .tokens import wide

ROWS = 16  # examples read at once
ENOUGH = 128  # examples for a mean or a second moment


def batches(examples: Sequence[Example], at_most: int = ENOUGH) -> Iterator[Batch]:
    """At most so many examples, spread over all of them and always the same ones."""
    stride = max(1, -(-len(examples) // at_most))
    chosen = list(range(0, len(examples), stride))
    for start in range(0, len(chosen), ROWS):
        numbers = chosen[start : start + ROWS]
        yield collate([examples[i] for i in numbers], numbers)


def inner(batch: Batch) -> Tensor:
    """[B, T] bool: tokens that are neither padding nor a text's first, the attention's sink."""
    counted = batch.mask.bool()
    counted[:, 0] = False
    return counted


def states(passes: Passes, examples: Sequence[Example], block: int) -> Tensor:
    """[N, D] fp32 on the CPU: outputs of `block` of the untouched model at the inner tokens."""
    found = []
    for batch in batches(examples):
        hidden = passes.reference(batch, hidden=(block,)).hidden[block].float().cpu()
        found.append(hidden[inner(batch)])
    return torch.cat(found)


def embedding(states: Tensor, counted: Tensor) -> Tensor:
    """[B, D]: the mean of states [B, T, D] where counted [B, T] is true."""
    weight = counted.to(torch.float32)[..., None]
    return (wide(states) * weight).sum(1) / weight.sum(1).clamp_min(1)
