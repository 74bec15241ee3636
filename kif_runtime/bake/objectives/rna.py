"""RNA: noise on the reference's retain representation, beside any objective.

Source: arXiv 2501.19202. While the reference (the adapter disabled) reads retain text, δ ~ N(0, ν I) is added to the
output of one block; the student, which sees no noise, is held to what comes out. What a retain question answers then
stands even if a forget token is dropped into it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def noise(states: Tensor, variance: float, generator: torch.Generator) -> Tensor:
    """states + δ, drawn on the CPU in fp32 so that a seed means the same on every device."""
    drawn = torch.randn(states.shape, generator=generator) * math.sqrt(variance)
    return states + drawn.to(states.device, states.dtype)


@contextmanager
def noisy(block: nn.Module, variance: float, generator: torch.Generator) -> Iterator[None]:
    """Inside, δ is added to the output of `block` at every forward; nothing is touched where the variance is 0."""

    def hook(_module: nn.Module, _args: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return (noise(output[0], variance, generator), *output[1:])
        return noise(output, variance, generator)

    if variance == 0:
        yield
        return
    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
