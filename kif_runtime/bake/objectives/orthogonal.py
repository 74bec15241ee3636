"""Closed-form weight orthogonalisation: a direction is removed from all that is written into the residual stream.

For a matrix W [out, in] that writes into the residual stream and a unit direction u [out]:

    W' = W − s u uᵀ W,   which is a LoRA of rank 1, exactly: B = −s u, A = uᵀ W

Source: arXiv 2406.11717 (as 'abliteration', and by heretic, applied to attention output and MLP down projections).
No training and no gate: the direction is gone for every token of every text, so neighbours pay; a baseline. u is the
difference of means that the capsule holds, subject against controls, the last row of the basis of its last signature.
The token embedding writes into the residual stream, too, and is left as it is (an adapter of linear layers cannot carry
it), so what the embedding holds of the direction stays; so do experts that are not linear modules.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...capsule import Capsule
from ...errors import BakingError
from ..settings import Settings
from .base import Objective, Setup
from .layers import weight, write
from .tokens import wide

# Attention output and MLP down projections by the names that transformers gives them.
WRITERS = ("o_proj", "down_proj", "out_proj", "fc2", "c_proj", "dense", "dense_4h_to_h")


class Orthogonal(Objective):
    """strength: s. Every writer of every adapted block; one direction a capsule, so the rank bounds the capsules."""

    name = "orthogonal"
    validated_at = None
    closed_form = True
    completions = False

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def settings(self, last_site: int, blocks: int) -> Settings:
        return Settings(rank=8, alpha=8)

    def prepare(self, setup: Setup) -> None:
        u = directions(setup.passes.capsules)
        chosen = [layer for path, layer in setup.layers.items() if path.rpartition(".")[2] in WRITERS]
        if not chosen:
            raise BakingError("no adapted projection writes into the residual stream; adapt all of them")
        for layer in chosen:
            write(layer, *update(weight(layer), u, self.strength))


def directions(capsules: Sequence[Capsule]) -> Tensor:
    """U [C, D], orthonormal rows: the capsules' differences, each made orthogonal to those before."""
    rows = [max(c.signatures, key=lambda s: s.site).basis[-1].double() for c in capsules]
    return torch.linalg.qr(torch.stack(rows).T).Q.T


def update(weight: Tensor, directions: Tensor, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """(B [out, r], A [r, in]) with B A = −s Uᵀ U W. weight [out, in]; directions U [r, out], orthonormal rows."""
    base = wide(weight)
    u = directions.to(base.device, base.dtype)
    return -strength * u.T, u @ base
