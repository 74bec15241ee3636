"""ReGLU: LoRA begins in the directions that tell forget text from retain text, and stays off the retain subspace.

Source: arXiv 2604.17396. For each adapted matrix W [out, in], with y = W x on the untouched model:
    Cov_Δ = (1 − β) Cov_forget − β Cov_retain of y;  B = U, its top r eigenvectors;  A = Uᵀ W
    penalty λ ‖Bᵀ P‖²_F, P [out, k] the top k eigenvectors of Cov_retain
with r 32, β .7, λ .5 and k 128 on TOFU.

There W is adjusted by −BA, so that training starts from the untouched model. An adapter cannot carry an adjusted W,
and the reference (the adapter disabled) must stay the untouched model, so the start here is A = −step · Uᵀ W: with
step 0 exactly the untouched model, with the same column space; with step > 0 a known move, that share of the outputs'
component in U taken away. What differs from the source at step 0: B receives no gradient before A has moved.
Both moments are taken about the *retain* mean: what a single subject's states differ in is above all their mean.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .tokens import wide


@dataclass
class Moments:
    """Running mean and second moment of outputs, float64 on the CPU."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    square: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, y: Tensor) -> None:
        """y [N, out]."""
        rows = y.detach().double().cpu()
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.square = self.square + rows.T @ rows

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    def covariance(self, centre: Tensor) -> Tensor:
        """Mean of (y − centre)(y − centre)ᵀ [out, out]."""
        cross = torch.outer(self.mean, centre)
        return self.square / self.count - cross - cross.T + torch.outer(centre, centre)


def top_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """[n, count], orthonormal columns, those of the largest (not the most negative) eigenvalues first."""
    return torch.linalg.eigh(symmetric).eigenvectors.flip(-1)[:, :count]


def forget_directions(forget: Moments, retain: Moments, rank: int, beta: float = 0.7) -> Tensor:
    """U [out, rank]."""
    centre = retain.mean
    contrast = (1 - beta) * forget.covariance(centre) - beta * retain.covariance(centre)
    return top_eigenvectors(contrast, rank)


def retain_basis(retain: Moments, size: int = 128) -> Tensor:
    """P [out, min(size, out)]."""
    return top_eigenvectors(retain.covariance(retain.mean), size)


def start(weight: Tensor, directions: Tensor, scaling: float, step: float = 0.0) -> tuple[Tensor, Tensor]:
    """(B [out, r], A [r, in]) such that scaling · B A = −step · U Uᵀ W."""
    u = directions.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    return u, -(step / scaling) * (u.T @ wide(weight))


def penalty(b: Tensor, basis: Tensor) -> Tensor:
    """‖Bᵀ P‖²_F [] of lora_B [out, r] and P [out, k]: how much of the update's output lies in the retain subspace."""
    return (b.T @ basis.to(b.device, b.dtype)).square().sum()
