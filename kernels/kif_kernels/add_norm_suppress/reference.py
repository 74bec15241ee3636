"""What the fused operator means: residual add, suppress, RMSNorm, in plain PyTorch.

    x        = hidden + residual                      in fp32
    x        ← suppress(x)                            `suppress/reference.py`; nothing where nothing fires
    residual = x, rounded to its dtype
    hidden   = w · x / √(mean x² + ε)                 of the x that was not rounded

The last two lines are vLLM's `fused_add_rms_norm` step by step (vllm/ir/ops/layernorm.py, 0.32), so that a token on
which nothing fires gets its bits: the quotient is rounded to the weight's dtype, multiplied there, and rounded to
hidden's. Gemma's norm multiplies by 1 + w in fp32 (GemmaRMSNorm, the same version): `one_plus`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..layout import Candidates, SiteTensors
from ..suppress import reference


def norm(x: Tensor, weight: Tensor, epsilon: float, one_plus: bool, dtype: torch.dtype) -> Tensor:
    """x [..., D] fp32 or float64 -> RMSNorm of it with weight [D], rounded to `dtype`."""
    if one_plus:
        weight = weight.to(x.dtype) + 1.0
    x = x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + epsilon)
    return (x.to(weight.dtype) * weight).to(dtype)


def work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def add_norm_suppress_(
    hidden: Tensor,
    residual: Tensor,
    rows: Tensor,
    site: SiteTensors,
    weight: Tensor,
    epsilon: float,
    one_plus: bool = False,
    hits: Tensor | None = None,
    candidates: Candidates | None = None,
    suppress_: Callable[..., None] = reference.suppress_,
) -> None:
    """`suppress_` is the path that edits the sum: the specification's own unless another is given."""
    work = work_dtype(hidden)
    x = hidden.to(work) + residual.to(work)
    suppress_(x, rows, site, hits, candidates)
    residual.copy_(x)
    hidden.copy_(norm(x, weight, epsilon, one_plus, hidden.dtype))


def suppress_normed_(
    normed: Tensor,
    residual: Tensor,
    rows: Tensor,
    site: SiteTensors,
    weight: Tensor,
    epsilon: float,
    one_plus: bool = False,
    hits: Tensor | None = None,
    candidates: Candidates | None = None,
) -> None:
    """After the host's own add and norm: x is the rounded residual, and only tokens on which something fires change."""
    before = residual.to(work_dtype(residual))
    x = before.clone()
    reference.suppress_(x, rows, site, hits, candidates)
    touched = ((x != before) & ~x.isnan()).any(-1)
    residual[touched] = x[touched].to(residual.dtype)
    normed[touched] = norm(x[touched], weight, epsilon, one_plus, normed.dtype)
