"""The operator `detect`: which of very many signatures may fire on each token. Check, choose the path, call.

`candidate_buffers` and `listed` are for hosts: they say where it comes before suppression, and call it there.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_candidates, check_like, check_tokens
from ..layout import SITE_ARGUMENTS, Candidates, KernelError, SiteTensors
from ..suppress import kernels, without_autocast
from ..tuned import LONGEST_CHUNK
from . import cpu, reference

SCREENS_ITSELF = ("cpu",)

_library = torch.library.Library("kif", "FRAGMENT")
_library.define(
    f"detect(Tensor x, Tensor? residual, Tensor rows, {SITE_ARGUMENTS}, Tensor(a!) count, Tensor(b!) found, "
    "Tensor(c!) work) -> ()"
)


def detect(
    x: Tensor, rows: Tensor, site: SiteTensors, candidates: Candidates, *, residual: Tensor | None = None
) -> None:
    """List for each token the signatures of its capsule set that may fire on it, in `candidates`.

    x [N, D] with rows [N], or [B, T, D] with rows [B] (then N = B·T): fp16, bf16, fp32 or float64, any strides. rows
    int32: the capsule set of each token or batch row; -1 has no candidates. residual: a tensor of x's shape and dtype
    that is added to x in fp32 first (float64 for float64), as `add_norm_suppress_` does. candidates: buffers of N
    tokens, `Candidates.empty`; what was in its count and lists does not matter. On a GPU it is one launch.
    Never misses: every signature that fires is listed, or the token overflows. It is a screen with a proven margin
    (`screening_margin`): a few signatures that do not fire may be listed too, and which depends on path and batch.
    So whoever reads the list decides, by the fixed-order score, and results do not depend on the screen.
    Raises KernelError for shapes, dtypes or devices that do not fit, or where candidates cannot be written.
    """
    check_tokens(x, rows, site)
    if residual is not None:
        check_like(residual, x, "residual", "x")
    check_candidates(candidates, x)
    if candidates.work is None:
        raise KernelError("candidates has no buffer to work in; make it with Candidates.empty")
    torch.ops.kif.detect(x, residual, rows, *site.tensors, candidates.count, candidates.found, candidates.work)


def candidate_buffers(sites: Iterable[SiteTensors], tokens: int) -> Candidates | None:
    """Candidates for up to `tokens` tokens at these sites, one after another; None where none `wants_listing`."""
    wanting = [site for site in sites if wants_listing(site)]
    return Candidates.empty(tokens, device=wanting[0].detector.device) if wanting else None


def wants_listing(site: SiteTensors) -> bool:
    """Whether `detect` comes before suppression here: where a capsule set has room for more signatures than a program
    decides on at once. Not on the CPU, where suppression screens for itself. By shapes alone: a graph has it or not.
    """
    return site.detector.device.type not in SCREENS_ITSELF and site.sets.shape[1] > LONGEST_CHUNK


def listed(
    x: Tensor, rows: Tensor, site: SiteTensors, buffers: Candidates | None, *, residual: Tensor | None = None
) -> Candidates | None:
    """What suppression at this site is to be given as candidates: what `detect` lists in the first of `buffers`, or
    None where the site does not want listing.
    """
    if buffers is None or not wants_listing(site):
        return None
    candidates = buffers.first(x.shape[:-1].numel())
    detect(x, rows, site, candidates, residual=residual)
    return candidates


def _detect_on_cpu(x: Tensor, residual: Tensor | None, rows: Tensor, *rest: Any) -> None:
    *tensors, count, found, work = rest
    path = reference.detect if x.dtype == torch.float64 else cpu.detect
    with without_autocast("cpu"):
        path(x, rows, SiteTensors(*tensors), Candidates(count, found, work), residual)


def _detect_on_gpu(x: Tensor, residual: Tensor | None, rows: Tensor, *rest: Any) -> None:
    *tensors, count, found, work = rest
    path: Any = kernels("detect", x.dtype) or reference
    path.detect(x, rows, SiteTensors(*tensors), Candidates(count, found, work), residual)


_library.impl("detect", _detect_on_cpu, "CPU")
_library.impl("detect", _detect_on_gpu, "CUDA")
torch.library.register_fake("kif::detect", lambda *_: None, lib=_library)
