"""The operators at a server's fused add and RMSNorm: in its place, or after it. Check, choose the path, call."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks import check_candidates, check_hits, check_in_place, check_like, check_tokens
from ..layout import FLOATS, SITE_ARGUMENTS, Candidates, KernelError, SiteTensors
from ..suppress import kernels, packed, unpacked, without_autocast
from . import cpu, reference

_library = torch.library.Library("kif", "FRAGMENT")
for _name, _first in (("add_norm_suppress_", "hidden"), ("suppress_normed_", "normed")):
    _library.define(
        f"{_name}(Tensor(a!) {_first}, Tensor(b!) residual, Tensor rows, {SITE_ARGUMENTS}, Tensor weight, "
        "float epsilon, bool one_plus, Tensor(c!)? hits, Tensor? count, Tensor? found) -> ()"
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
    candidates: Candidates | None = None,
) -> None:
    """residual ← suppress(hidden + residual), hidden ← RMSNorm of that, both in place.

    hidden, residual [N, D] with rows [N], or [B, T, D] with rows [B]: one dtype of fp16, bf16, fp32 (fp32 inside) or
    float64. rows int32: the capsule set of each token or batch row, -1 for none. weight [D], of any float dtype;
    epsilon the norm's. one_plus: multiply by 1 + weight in fp32 (Gemma), else by weight in its own dtype. hits [N, C]
    bool, N = B·T, and candidates (`detect` with residual=residual) as for `suppress_`.
    Exact: a token on which nothing fires gets what vLLM's `fused_add_rms_norm` gives: on the CPU bit for bit what its
    plain PyTorch form gives there. Suppression works on the sum in fp32 before it is rounded, and so does the norm.
    What a signature does to a token depends on the token and its set alone, bit for bit; on a GPU the norm too.
    Raises KernelError for shapes, dtypes or devices that do not fit, or where a tensor written needs a gradient.
    """
    _check(hidden, "hidden", residual, rows, site, weight, hits, candidates)
    torch.ops.kif.add_norm_suppress_(
        hidden, residual, rows, *site.tensors, weight, epsilon, one_plus, hits, *unpacked(candidates)
    )


def suppress_normed_(
    normed: Tensor,
    residual: Tensor,
    rows: Tensor,
    site: SiteTensors,
    weight: Tensor,
    epsilon: float,
    *,
    one_plus: bool = False,
    hits: Tensor | None = None,
    candidates: Candidates | None = None,
) -> None:
    """residual ← suppress(residual), normed ← RMSNorm of that, only for tokens on which something fires.

    For exact mode on a GPU: it comes after the host's own fused add and norm, and all other tokens keep the host's
    bits. Arguments and errors are those of `add_norm_suppress_`; here suppression works on the residual as the host
    rounded it.
    """
    _check(normed, "normed", residual, rows, site, weight, hits, candidates)
    torch.ops.kif.suppress_normed_(
        normed, residual, rows, *site.tensors, weight, epsilon, one_plus, hits, *unpacked(candidates)
    )


def _check(
    x: Tensor,
    name: str,
    residual: Tensor,
    rows: Tensor,
    site: SiteTensors,
    weight: Tensor,
    hits: Tensor | None,
    candidates: Candidates | None,
) -> None:
    check_tokens(x, rows, site, name)
    check_like(residual, x, "residual", name)
    check_in_place(x, name)
    check_in_place(residual, "residual")
    if weight.shape != x.shape[-1:] or weight.dtype not in FLOATS or weight.device != x.device:
        got = f"{weight.dtype} {list(weight.shape)} on {weight.device}"
        raise KernelError(f"weight is {got}; expected a float dtype, [{x.shape[-1]}] on {x.device}")
    if not weight.is_contiguous():
        raise KernelError("weight is not contiguous; give weight.contiguous()")
    check_hits(hits, x, site)
    check_candidates(candidates, x)


def _on_cpu(name: str, x: Tensor, residual: Tensor, rows: Tensor, *rest: Any) -> None:
    *tensors, weight, epsilon, one_plus, hits, count, found = rest
    module: Any = reference if x.dtype == torch.float64 else cpu
    with without_autocast("cpu"):
        getattr(module, name)(
            x, residual, rows, SiteTensors(*tensors), weight, epsilon, one_plus, hits, packed(count, found)
        )


def _on_gpu(name: str, x: Tensor, residual: Tensor, rows: Tensor, *rest: Any) -> None:
    *tensors, weight, epsilon, one_plus, hits, count, found = rest
    module: Any = kernels("add_norm_suppress", x.dtype, x.shape[-1]) or reference
    getattr(module, name)(
        x, residual, rows, SiteTensors(*tensors), weight, epsilon, one_plus, hits, packed(count, found)
    )


for _name in ("add_norm_suppress_", "suppress_normed_"):
    _library.impl(_name, partial(_on_cpu, _name), "CPU")
    _library.impl(_name, partial(_on_gpu, _name), "CUDA")
    torch.library.register_fake(f"kif::{_name}", lambda *_: None, lib=_library)
