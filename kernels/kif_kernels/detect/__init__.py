"""The operator `detect`: which of very many signatures may fire on each token. Check, choose the path, call."""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_candidates, check_like, check_tokens
from ..layout import SITE_ARGUMENTS, Candidates, SiteTensors
from ..suppress import kernels, without_autocast
from . import cpu, reference

_library = torch.library.Library("kif", "FRAGMENT")
_library.define(
    f"detect(Tensor x, Tensor? residual, Tensor rows, {SITE_ARGUMENTS}, Tensor(a!) count, Tensor(b!) found) -> ()"
)


def detect(
    x: Tensor, rows: Tensor, site: SiteTensors, candidates: Candidates, *, residual: Tensor | None = None
) -> None:
    """List for each token the signatures of its capsule set that may fire on it, in `candidates`.

    x [N, D] with rows [N], or [B, T, D] with rows [B] (then N = B·T): fp16, bf16, fp32 or float64, any strides. rows
    int32: the capsule set of each token or batch row; -1 has no candidates. residual: a tensor of x's shape and dtype
    that is added to x in fp32 first (float64 for float64), as `add_norm_suppress_` does. candidates: buffers of N
    tokens, `Candidates.empty`; what was in them does not matter.
    Never misses: every signature that fires is listed, or the token overflows. It is a screen with a proven margin
    (`screening_margin`): a few signatures that do not fire may be listed too, and which depends on path and batch.
    So whoever reads the list decides, by the fixed-order score, and results do not depend on the screen.
    Raises KernelError for shapes, dtypes or devices that do not fit.
    """
    check_tokens(x, rows, site)
    if residual is not None:
        check_like(residual, x, "residual", "x")
    check_candidates(candidates, x)
    torch.ops.kif.detect(x, residual, rows, *site.tensors, candidates.count, candidates.found)


def _detect_on_cpu(x: Tensor, residual: Tensor | None, rows: Tensor, *rest: Any) -> None:
    *tensors, count, found = rest
    path = reference.detect if x.dtype == torch.float64 else cpu.detect
    with without_autocast("cpu"):
        path(x, rows, SiteTensors(*tensors), Candidates(count, found), residual)


def _detect_on_gpu(x: Tensor, residual: Tensor | None, rows: Tensor, *rest: Any) -> None:
    *tensors, count, found = rest
    path: Any = kernels("detect", x.dtype) or reference
    path.detect(x, rows, SiteTensors(*tensors), Candidates(count, found), residual)


_library.impl("detect", _detect_on_cpu, "CPU")
_library.impl("detect", _detect_on_gpu, "CUDA")
torch.library.register_fake("kif::detect", lambda *_: None, lib=_library)
