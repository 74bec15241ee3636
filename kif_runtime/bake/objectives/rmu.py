"""RMU and SRMU: hidden states of forget text are led to a fixed target, those of retain text are held.

RMU (arXiv 2403.03218): L = ‖H(x_f) − c·u‖² + α ‖H(x_r) − H₀(x_r)‖², u a random unit vector with entries uniform in
[0, 1) before normalisation, at one block. SRMU (arXiv 2512.16297): the target is c · V ⊙ I with V ∈ {±1}^D fixed and
I = log(1 + v_f/(v_r + ε)) from mean absolute activations, divided by its maximum: dimensions that forget text uses more
than retain text are moved most, those it shares least.

‖·‖² is the mean over D and over tokens, as in RMU's code. c is given as a share of the mean norm of the forget states
in the untouched model (as adaptive RMU, arXiv 2408.06223, does), since norms differ by a factor of a hundred between
models and depths. Where SRMU normalises I, and its ε, we read second-hand.
"""

import torch
from torch import Tensor

from .tokens import wide


def random_target(width: int, generator: torch.Generator) -> Tensor:
    """u [D], fp32, of norm 1."""
    drawn = torch.rand(width, generator=generator)
    return drawn / drawn.norm()


def importance(forget: Tensor, retain: Tensor, eps: float = 1e-6) -> Tensor:
    """I [D] in [0, 1] from states of the untouched model, forget [N, D] and retain [M, D]."""
    ratio = wide(forget).abs().mean(0) / (wide(retain).abs().mean(0) + eps)
    raised = ratio.log1p()
    return raised / raised.max()


def structured_target(forget: Tensor, retain: Tensor, generator: torch.Generator, eps: float = 1e-6) -> Tensor:
    """V ⊙ I ÷ √D [D], of norm 1 at most, so that c has the same meaning as in RMU."""
    width = forget.shape[-1]
    signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
    return signs.to(forget.device) * importance(forget, retain, eps) / width**0.5


def coefficient(forget: Tensor, share: float) -> float:
    """c: `share` of the mean norm of the untouched model's forget states [N, D]."""
    return share * float(wide(forget).norm(dim=-1).mean())


def distance(states: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Mean squared difference [B] over D and the positions where `counted` [B, T] is True.

    states [B, T, D]; target [B, T, D] or [D]. 0, with gradient 0, where they are equal.
    """
    each = (wide(states) - wide(target)).square().mean(-1)
    weight = counted.to(each.dtype)
    return (each * weight).sum(1) / weight.sum(1).clamp_min(1)
