"""The operator `add_norm_suppress_`, in place of a server's fused add and RMSNorm: check, choose the path, call."""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_hits, check_in_place, check_tokens
from ..layout import FLOATS, SITE_ARGUMENTS, KernelError, SiteTensors
from ..suppress import cpu, without_autocast
from . import reference

_library = torch.library.Library("kif", "FRAGMENT")
_library.define(
    f"add_norm_suppress_(Tensor(a!) hidden, Tensor(b!) residual, Tensor rows, {SITE_ARGUMENTS}, Tensor weight, "
    "float epsilon, bool one_plus, Tensor(c!)? hits) -> ()"
)


def add_norm_suppress_(
    hidden: Tensor,
    residual: Tensor,
    rows: Tensor,
    site: SiteTensors,
    weight: Tensor,
    epsilon: float,
    *,
    one_plus: bool = False,
    hits: Tensor | None = None,
) -> None:
    """residual ← suppress(hidden + residual), hidden ← RMSNorm of that, both in place.

    hidden, residual [N, D] with rows [N], or [B, T, D] with rows [B]: one dtype of fp16, bf16, fp32 (fp32 inside) or
    float64. rows int32: the capsule set of each token or batch row, -1 for none. weight [D], of any float dtype;
    epsilon the norm's. one_plus: multiply by 1 + weight in fp32 (Gemma), else by weight in its own dtype. hits [N, C]
    bool, N = B·T, as for `suppress_`.
    Exact: a token on which nothing fires gets what vLLM's `fused_add_rms_norm` gives: on the CPU bit for bit what its
    plain PyTorch form gives there. Suppression works on the sum in fp32 before it is rounded, and so does the norm.
    What a signature does to a token depends on the token and its set alone, bit for bit.
    Raises KernelError for shapes, dtypes or devices that do not fit, or where a tensor written needs a gradient.
    """
    check_tokens(hidden, rows, site, "hidden")
    check_in_place(hidden, "hidden")
    check_in_place(residual, "residual")
    check_hits(hits, hidden)
    for name, tensor, shape, dtypes in (
        ("residual", residual, hidden.shape, (hidden.dtype,)),
        ("weight", weight, hidden.shape[-1:], FLOATS),
    ):
        if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != hidden.device:
            expected = f"{' or '.join(map(str, dtypes))} {list(shape)} on {hidden.device}"
            raise KernelError(f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; expected {expected}")
    torch.ops.kif.add_norm_suppress_(hidden, residual, rows, *site.tensors, weight, epsilon, one_plus, hits)


def _on_cpu(hidden: Tensor, residual: Tensor, rows: Tensor, *rest: Any) -> None:
    """The server's own computation, with the fast CPU path on its sum: it writes only the tokens that fire."""
    *tensors, weight, epsilon, one_plus, hits = rest
    path = reference.suppress.suppress_ if hidden.dtype == torch.float64 else cpu.suppress_
    with without_autocast("cpu"):
        reference.add_norm_suppress_(
            hidden, residual, rows, SiteTensors(*tensors), weight, epsilon, one_plus, hits, path
        )


_library.impl("add_norm_suppress_", _on_cpu, "CPU")
torch.library.register_fake("kif::add_norm_suppress_", lambda *_: None, lib=_library)
