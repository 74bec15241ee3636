"""RMU and SRMU: hidden states of forget text are led to a fixed target, those of retain text are held.

RMU (arXiv 2403.03218): L = ‖H(x_f) − c·u‖² + α ‖H(x_r) − H₀(x_r)‖², u a random unit vector with entries uniform in
[0, 1) before normalisation, at one block. SRMU (arXiv 2512.16297): the target is c · V ⊙ I with V ∈ {±1}^D fixed and
I = log(1 + v_f/(v_r + ε)) from mean absolute activations, divided by its maximum: dimensions that forget text uses more
than retain text are moved most.

‖·‖² is the mean over D and over tokens, as in RMU's code. c is given as a share of the mean norm of the forget states
in the untouched model (as in adaptive RMU, arXiv 2408.06223), since norms differ by a factor of a hundred between
models and depths; for SRMU it is divided by √D, so that the target's norm is at most that of RMU's. A text's first
token, the attention's sink, is not moved. How SRMU normalises I, and its ε, was read second-hand.
"""

import torch
from torch import Tensor

from ..settings import Settings
from .base import Objective, Setup, Step
from .layers import block_at
from .tokens import wide
from .untouched import inner, states


class Rmu(Objective):
    """share: c ÷ mean norm of the forget states. retain: α. depth: of the block, as a share of all.

    The source has block 7 of 32. Blocks after it neither run nor are trained.
    """

    name = "rmu"
    validated_at = None
    completions = False

    def __init__(self, share: float = 2.0, retain: float = 1200.0, depth: float = 0.22) -> None:
        self.share, self.retain, self.depth = share, retain, depth
        self.block, self._target = 0, torch.zeros(0)

    def settings(self, last_site: int, blocks: int) -> Settings:
        return Settings(blocks=block_at(self.depth, last_site, blocks) + 1, learning_rate=1e-3, steps=60)

    def prepare(self, setup: Setup) -> None:
        self.block = block_at(self.depth, setup.passes.sites[-1], len(setup.passes.blocks))
        forget, retain = (states(setup.passes, e, self.block) for e in (setup.forget, setup.retain))
        c = self.share * float(forget.norm(dim=-1).mean())
        self._target = c * self._direction(forget, retain, setup.generator)

    def _direction(self, forget: Tensor, retain: Tensor, generator: torch.Generator) -> Tensor:
        return random_direction(forget.shape[-1], generator)

    def loss(self, step: Step) -> dict[str, Tensor]:
        block = (self.block,)
        moved = step.student(step.forget, hidden=block).hidden[self.block]
        held = step.student(step.retain, hidden=block).hidden[self.block]
        was = step.reference(step.retain, hidden=block).hidden[self.block]
        return {
            "forget": distance(moved, self._target.to(moved.device), inner(step.forget)).mean(),
            "retain": self.retain * distance(held, was, step.retain.mask).mean(),
        }


class Srmu(Rmu):
    """RMU with the structured target."""

    name = "srmu"

    def _direction(self, forget: Tensor, retain: Tensor, generator: torch.Generator) -> Tensor:
        return structured_direction(forget, retain, generator)


def random_direction(width: int, generator: torch.Generator) -> Tensor:
    """u [D], fp32, of norm 1."""
    drawn = torch.rand(width, generator=generator)
    return drawn / drawn.norm()


def importance(forget: Tensor, retain: Tensor, eps: float = 1e-6) -> Tensor:
    """I [D] in [0, 1] from states of the untouched model, forget [N, D] and retain [M, D]."""
    ratio = wide(forget).abs().mean(0) / (wide(retain).abs().mean(0) + eps)
    raised = ratio.log1p()
    return raised / raised.max()


def structured_direction(forget: Tensor, retain: Tensor, generator: torch.Generator) -> Tensor:
    """V ⊙ I ÷ √D [D], of norm 1 at most."""
    width = forget.shape[-1]
    signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
    return signs.to(forget.device) * importance(forget, retain) / width**0.5


def distance(states: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Mean squared difference [B] over D and the positions where `counted` [B, T] is true.

    states [B, T, D]; target [B, T, D] or [D]. 0, with gradient 0, where they are equal.
    """
    each = (wide(states) - wide(target)).square().mean(-1)
    weight = counted.to(each.dtype)
    return (each * weight).sum(1) / weight.sum(1).clamp_min(1)
