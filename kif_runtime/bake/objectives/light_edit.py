"""The closed-form edit of `unierase`, as a LoRA.

For the keys K [n, in] of a projection (its inputs where the subject was named) and the changes R [n, out] wanted there,

    ΔW = Rᵀ (K P Kᵀ + λ I)⁻¹ K P        P: the projector onto what retain keys do not span

solves min ‖ΔW' P Kᵀ − Rᵀ‖² + λ‖ΔW' P‖² (AlphaEdit, arXiv 2410.02355, without earlier edits; here in the n × n form).
Its rank is at most n, so it is a LoRA: B = Rᵀ(·)⁻¹, A = K P, exactly where n ≤ r and else the best of rank r.
"""

import math

import torch
from torch import Tensor

from .tokens import wide


def free_projector(retain: Tensor, share: float = 0.02, least: float = 0.25) -> Tensor:
    """P [in, in], float64: where the retain keys' second moment has eigenvalues below `share` of their mean, and at
    least that share `least` of all dimensions where it is smallest.

    retain [M, in]: keys. AlphaEdit takes an absolute bound of 2e-2 there; norms differ too much for that.
    """
    keys = retain.double().cpu()
    values, vectors = torch.linalg.eigh(keys.T @ keys / len(keys))
    count = max(int((values < share * values.mean()).sum()), math.ceil(least * len(values)))
    free = vectors[:, :count]
    return free @ free.T


def light_edit(keys: Tensor, changes: Tensor, projector: Tensor, ridge: float = 1e-2) -> tuple[Tensor, Tensor]:
    """(B [out, n], A [n, in]) of ΔW, fp32. keys [n, in], changes [n, out]; ridge: λ as a share of mean |K P|²."""
    k, r = keys.double().cpu(), changes.double().cpu()
    seen = k @ projector
    gram = seen @ k.T
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(k), dtype=gram.dtype)
    return torch.linalg.solve(gram, r).T.float(), seen.float()


def of_rank(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of B A of the given rank, as (B, A), and the share of ‖B A‖²_F that it leaves out."""
    qb, rb = torch.linalg.qr(wide(b))
    qa, ra = torch.linalg.qr(wide(a).T)
    u, s, v = torch.linalg.svd(rb @ ra.T)
    kept = min(rank, len(s))
    lost = float(s[kept:].square().sum() / s.square().sum().clamp_min(1e-30))
    root = s[:kept].sqrt()
    return qb @ (u[:, :kept] * root), (root[:, None] * v[:kept]) @ qa.T, lost
