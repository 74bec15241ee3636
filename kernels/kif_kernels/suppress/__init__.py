"""The operator `suppress_`: check, choose the path, call. Registered as torch.ops.kif.*, so that graphs keep it."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from ..checks import check_candidates, check_hits, check_in_place, check_tokens, check_width
from ..layout import SITE_ARGUMENTS, Candidates, SiteTensors
from ..tuned import LONGEST_CHUNK, WIDEST
from . import cpu, reference

_library = torch.library.Library("kif", "DEF")
_library.define(
    f"suppress_(Tensor(a!) x, Tensor rows, {SITE_ARGUMENTS}, Tensor(b!)? hits, Tensor? count, Tensor? found) -> ()"
)
_library.define(f"suppress(Tensor x, Tensor rows, {SITE_ARGUMENTS}) -> Tensor")
_library.define(f"suppress_backward(Tensor grad, Tensor x, Tensor rows, {SITE_ARGUMENTS}) -> Tensor")
_library.define("scores(Tensor x, Tensor detector, Tensor bias) -> Tensor")


def suppress_(
    x: Tensor, rows: Tensor, site: SiteTensors, hits: Tensor | None = None, candidates: Candidates | None = None
) -> None:
    """Remove from each token what the signatures of its capsule set find there, in place.

    x [N, D] with rows [N], or [B, T, D] with rows [B]: fp16, bf16, fp32 (fp32 inside) or float64, any strides that do
    not overlap (on a GPU the last is 1). rows int32: the capsule set of each token or batch row; -1 leaves it alone.
    hits [N, C] bool, N = B·T: set True where a signature of that capsule had a gate of at least 1/2, never set False.
    candidates: what `detect` found for the same x, rows and site. The result is the same with and without it; with it
    only those signatures are looked at, which pays where sets are long.
    Exact: a token on which nothing fires is not written. What happens to a token depends on it and its set alone, bit
    for bit. x is rounded once, at the end. A token with NaN or ±inf fires nothing. On a GPU a soft gate's weight may
    differ from the CPU's in its last bits (another exp); decisions and everything else do not.
    Raises KernelError for shapes, dtypes or devices that do not fit, or where x needs a gradient (use `suppress`).
    """
    check_tokens(x, rows, site)
    check_in_place(x, otherwise="use suppress")
    check_hits(hits, x, site)
    check_candidates(candidates, x)
    torch.ops.kif.suppress_(x, rows, *site.tensors, hits, *unpacked(candidates))


def suppress(x: Tensor, rows: Tensor, site: SiteTensors) -> Tensor:
    """`suppress_` out of place, differentiable in x; same arguments, a new tensor of x's shape and dtype.

    The forward pass is taken again for the gradient, so that nothing but x is kept. A hard gate has gradient zero, so
    it passes through the projection only. On a GPU there is a kernel for sets of up to 64 signatures (fp32: D to 4096).
    """
    check_tokens(x, rows, site)
    return torch.ops.kif.suppress(x, rows, *site.tensors)


def scores(x: Tensor, site: SiteTensors) -> Tensor:
    """The scores that decide, of every token and slot: x [..., D] -> [..., S] fp32, -inf in free slots."""
    check_width(x, site)
    flat = torch.ops.kif.scores(x.reshape(-1, x.shape[-1]), site.detector, site.bias)
    return flat.reshape(*x.shape[:-1], flat.shape[-1])


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Where autocast is on, the context without it: it would screen in bf16, and norm."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def unpacked(candidates: Candidates | None) -> tuple[Tensor | None, Tensor | None]:
    """As the registered operators take them."""
    return (None, None) if candidates is None else (candidates.count, candidates.found)


def packed(count: Tensor | None, found: Tensor | None) -> Candidates | None:
    return None if count is None or found is None else Candidates(count, found)


@cache
def kernels(op: str, dtype: torch.dtype, width: int = 1) -> ModuleType | None:
    """The Triton kernels of an op (the module `<op>/triton.py`), or None and one warning where they cannot serve.

    width: D where a token stays in a program's registers, which hold up to WIDEST numbers.
    """
    if dtype == torch.float64:
        return _warn_of_reference("for float64")
    if width > WIDEST:
        return _warn_of_reference(f"for tokens of over {WIDEST} numbers")
    if find_spec("triton") is None:
        return _warn_of_reference("without triton")
    return import_module(f"..{op}.triton", __package__)


@cache
def _warn_of_reference(where: str) -> None:
    warn(f"KIF has no kernel {where}: its slow reference runs and waits for the device at every call", stacklevel=6)


def _suppress_cpu_(x: Tensor, rows: Tensor, *rest: Any) -> None:
    *tensors, hits, count, found = rest
    path = reference.suppress_ if x.dtype == torch.float64 else cpu.suppress_
    with without_autocast("cpu"):
        path(x, rows, SiteTensors(*tensors), hits, packed(count, found))


def _suppress_gpu_(x: Tensor, rows: Tensor, *rest: Any) -> None:
    *tensors, hits, count, found = rest
    path: Any = kernels("suppress", x.dtype, x.shape[-1]) or reference
    path.suppress_(x, rows, SiteTensors(*tensors), hits, packed(count, found))


def _suppress_out_of_place(x: Tensor, rows: Tensor, *tensors: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    torch.ops.kif.suppress_(out, rows, *tensors, None, None, None)
    return out


def _suppress_backward_cpu(grad: Tensor, x: Tensor, rows: Tensor, *tensors: Tensor) -> Tensor:
    return reference.suppress_backward(grad, x, rows, SiteTensors(*tensors))


def _suppress_backward_gpu(grad: Tensor, x: Tensor, rows: Tensor, *tensors: Tensor) -> Tensor:
    site = SiteTensors(*tensors)
    if site.sets.shape[1] > LONGEST_CHUNK:
        path: Any = _warn_of_reference(f"for gradients through sets of over {LONGEST_CHUNK} signatures")
    elif x.dtype == torch.float32 and x.shape[-1] > WIDEST // 2:  # on sm_90 it would spill
        path = _warn_of_reference(f"for gradients in fp32 of over {WIDEST // 2} numbers")
    else:
        path = kernels("suppress", x.dtype, x.shape[-1])
    return (path or reference).suppress_backward(grad, x, rows, site)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.kif.suppress_backward(grad, *ctx.saved_tensors), *([None] * (len(ctx.saved_tensors) - 1))


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _like_scores(x: Tensor, detector: Tensor, bias: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0], detector.shape[0]), dtype=dtype)


_library.impl("suppress_", _suppress_cpu_, "CPU")
_library.impl("suppress_", _suppress_gpu_, "CUDA")
_library.impl("suppress_backward", _suppress_backward_cpu, "CPU")
_library.impl("suppress_backward", _suppress_backward_gpu, "CUDA")
for _device in ("CPU", "CUDA"):
    _library.impl("suppress", _suppress_out_of_place, _device)
    _library.impl("scores", reference.scores, _device)
torch.library.register_fake("kif::suppress_", lambda *_: None, lib=_library)
torch.library.register_fake("kif::suppress", _like, lib=_library)
torch.library.register_fake("kif::suppress_backward", _like, lib=_library)
torch.library.register_fake("kif::scores", _like_scores, lib=_library)
torch.library.register_autograd("kif::suppress", _gradients, setup_context=_keep_inputs, lib=_library)
