"""ReGLU: LoRA begins in the directions that tell forget text from retain text, and stays off the retain subspace.

Source: arXiv 2604.17396. For each adapted matrix W [out, in], with y = W x on the untouched model:
    Cov_Δ = (1 − β) Cov_forget − β Cov_retain of y;  B = U, its top r eigenvectors;  A = Uᵀ W
    penalty λ ‖Bᵀ P‖²_F, P [out, k] the top k eigenvectors of Cov_retain
with r 32, β .7, λ .5 and k 128 on TOFU.

There W is adjusted by −BA, so that training starts from the untouched model. An adapter cannot carry an adjusted W,
and the reference (the adapter disabled) must stay the untouched model, so the start here is A = −step · Uᵀ W: with
step 0 exactly the untouched model, with the same column space; with step > 0 a known move, that share of the outputs'
component in U taken away. What differs from the source at step 0: B receives no gradient before A has moved.
Both moments are taken about the *retain* mean, without each text's first token: what a single subject's states differ
in is above all their mean. Which loss the source adds the penalty to was not to be had; here it is NPO. The penalty is
the mean over the adapted matrices, so that λ does not depend on how many there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..examples import Example
from ..settings import ATTENTION, Settings
from .base import Setup, Step
from .layers import weight, write
from .preference import Npo
from .rows import KL
from .tokens import wide
from .untouched import batches, inner


class Reglu(Npo):
    """NPO from ReGLU's start, with its penalty. contrast: β of the covariances; penalty: λ; basis: k; others: NPO's."""

    name = "reglu"

    def __init__(
        self,
        contrast: float = 0.7,
        penalty: float = 0.5,
        basis: int = 128,
        step: float = 0.0,
        beta: float = 0.1,
        retain: float = 1.0,
        held: str = KL,
    ) -> None:
        super().__init__(beta, retain, held)
        self.contrast, self.penalty, self.basis, self.step = contrast, penalty, basis, step
        self._retained: dict[str, Tensor] = {}

    def settings(self, last_site: int, blocks: int) -> Settings:
        """Attention projections of the first half: of wider outputs the eigenvectors take longer than the training."""
        return Settings(rank=32, alpha=32, blocks=-(-blocks // 2), targets=(ATTENTION,), learning_rate=3e-4, steps=60)

    def prepare(self, setup: Setup) -> None:
        forget, retain = (_moments(setup, examples) for examples in (setup.forget, setup.retain))
        for path, layer in setup.layers.items():
            base = weight(layer)
            u = forget_directions(forget[path], retain[path], setup.settings.rank, self.contrast)
            write(layer, *start(base, u, self.step))
            basis = retain_basis(retain[path], min(self.basis, base.shape[0] // 2))
            self._retained[f"{path}.lora_B.default.weight"] = basis.to(base.device, torch.float32)

    def loss(self, step: Step) -> dict[str, Tensor]:
        leaks = [penalty(step.adapter[name], basis) for name, basis in self._retained.items()]
        return super().loss(step) | {"off_retain": self.penalty * torch.stack(leaks).mean()}


def _moments(setup: Setup, examples: Sequence[Example]) -> dict[str, "Moments"]:
    """Path → moments of the layer's output in the untouched model, over the inner tokens."""
    found = {path: Moments() for path in setup.layers}
    counted = torch.zeros(0)

    def watch(moments: Moments) -> Any:
        def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
            moments.add(output[counted.to(output.device)])

        return hook

    handles = [layer.get_base_layer().register_forward_hook(watch(found[path])) for path, layer in setup.layers.items()]
    last = (setup.settings.blocks or len(setup.passes.blocks)) - 1
    try:
        for batch in batches(examples):
            counted = inner(batch)
            setup.passes.reference(batch, hidden=(last,))
    finally:
        for handle in handles:
            handle.remove()
    return found


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


def start(weight: Tensor, directions: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """(B [out, r], A [r, in]) such that B A = −step · U Uᵀ W."""
    base = wide(weight)
    u = directions.to(base.device, base.dtype)
    return u, -step * (u.T @ base)


def penalty(b: Tensor, basis: Tensor) -> Tensor:
    """‖Bᵀ P‖²_F [] of lora_B [out, r] and P [out, k]: how much of the update's output lies in the retain subspace."""
    return (b.T @ basis.to(b.device, b.dtype)).square().sum()
