"""Closed-form weight orthogonalisation: a direction is removed from all that is written into the residual stream.

For a matrix W [out, in] that writes into the residual stream and a unit direction u [out]:

    W' = W − s u uᵀ W,   which is a LoRA of rank 1, exactly: B = −s u, A = uᵀ W

Source: arXiv 2406.11717 (as 'abliteration' and by heretic applied to attention output and MLP down projections).
No training, no gate: the direction is gone for every token of every text, so neighbours pay; a baseline. The token
embedding writes into the residual stream, too, and is left as it is (an adapter of linear layers cannot carry it), so
what the embedding holds of the direction stays.
"""

import torch
from torch import Tensor, nn

from .tokens import wide

# Attention output and MLP down projections by the names that transformers gives them.
WRITERS = ("o_proj", "down_proj", "out_proj", "fc2", "c_proj", "dense", "dense_4h_to_h")


def writers(block: nn.Module) -> dict[str, nn.Module]:
    """The modules of a decoder block that write into the residual stream, by their names within it."""
    return {name: module for name, module in block.named_modules() if name.rpartition(".")[2] in WRITERS}


def difference(subject: Tensor, others: Tensor) -> Tensor:
    """u [1, D] from mean states: subject [N, D] against others [M, D]."""
    gap = wide(subject).mean(0) - wide(others).mean(0)
    return (gap / gap.norm())[None]


def update(weight: Tensor, directions: Tensor, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """(B [out, r], A [r, in]) with B A = −s Uᵀ U W. weight [out, in]; directions U [r, out], orthonormal rows."""
    u = directions.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    return -strength * u.T, u @ wide(weight)
