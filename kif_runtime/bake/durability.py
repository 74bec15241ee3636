"""Attacks in the loop: a step's losses are taken while the model is under attack, so that what is learned outlasts it.

Each is a context around a step's losses and their gradients. Steps under attack and steps in peace take turns.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import BakingError
from ..evaluation.attacks.quantisation import round_trip
from .adapter import keeps_inputs_first, layers
from .objectives import Step
from .passes import Passes
from .validation import distances

Pressure = Callable[[Step], Any]

RELEARN_STEPS, RELEARN_SIZE = 2, 0.02
LATENT_SIZE = 0.05


@contextmanager
def relearned(step: Step) -> Iterator[None]:
    """Inside, the adapter has taken RELEARN_STEPS steps back towards what it was to forget: down the gradient of the
    distance to the reference's states on the forget text, each RELEARN_SIZE of the adapter's own length. Leaving, the
    adapter is as it was; gradients taken inside are applied to it (first-order, as in TAR, arXiv 2408.00761, §4)."""
    values = {name: p.detach().clone() for name, p in step.adapter.items()}
    block = step.passes.sites[-1]
    own = step.reference(step.forget, hidden=[block])
    parameters = list(step.adapter.values())
    try:
        for _ in range(RELEARN_STEPS):
            loss = distances(step.student(step.forget, hidden=[block]), own, step.forget, block).mean()
            slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
            _move(parameters, slopes, -RELEARN_SIZE)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in step.adapter.items():
                parameter.copy_(values[name])


@torch.no_grad()
def _move(parameters: Sequence[Tensor], slopes: Sequence[Tensor | None], size: float) -> None:
    there = torch.stack([p.square().sum() for p in parameters]).sum().sqrt()
    steep = torch.stack([s.square().sum() for s in slopes if s is not None]).sum().sqrt().clamp_min(1e-12)
    for parameter, slope in zip(parameters, slopes, strict=True):
        if slope is not None:
            parameter += size * there / steep * slope


@contextmanager
def jolted(step: Step) -> Iterator[None]:
    """Inside, the output of the block before the last site is off by noise of LATENT_SIZE of each token's length."""
    block = max(0, step.passes.sites[-1] - 1)

    def off(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=step.generator).to(x.device, x.dtype)
        return x + LATENT_SIZE * x.norm(dim=-1, keepdim=True) * noise / noise.norm(dim=-1, keepdim=True)

    with step.passes.disturbing({block: off}):
        yield


@contextmanager
def rounded(step: Step) -> Iterator[None]:
    """Inside, the student's adapted projections compute with their merged weight rounded to 4 bits and back; the
    rounding error is a constant for the gradient (straight-through, Bengio et al., arXiv 1308.3432)."""
    handles = []
    for layer in layers(step.passes.model).values():
        handles.append(layer.register_forward_hook(_rounding(layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _rounding(layer: Any) -> Any:
    merged = layer.get_base_layer().weight + layer.get_delta_weight("default")
    error = round_trip(merged, "int4") - merged
    error = error if keeps_inputs_first(layer.get_base_layer()) else error.T

    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if module.disable_adapters:  # the reference and the teacher stay as they are
            return output
        return output + args[0] @ error.to(args[0].dtype)

    return hook


def calm(step: Step) -> Any:
    """No attack."""
    return nullcontext()


PRESSURES: dict[str, Pressure] = {"relearn": relearned, "latent": jolted, "4bit": rounded}


def pressures(names: Sequence[str], passes: Passes) -> list[Pressure]:
    """The contexts by name, in turns with steps without attack; none for no names."""
    if unknown := [name for name in names if name not in PRESSURES]:
        raise BakingError(f"there is no durability term {unknown[0]!r}; choose of {', '.join(PRESSURES)}")
    return [calm, *(PRESSURES[name] for name in names)] if names else []
