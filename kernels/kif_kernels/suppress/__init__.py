"""The operator `suppress_`: check, choose the path, call. Registered as torch.ops.kif.*, so that graphs keep it."""

from functools import cache
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from ..layout import FLOATS, SITE_ARGUMENTS, KernelError, SiteTensors
from . import cpu, reference

_library = torch.library.Library("kif", "DEF")
_library.define(f"suppress_(Tensor(a!) x, Tensor rows, {SITE_ARGUMENTS}, Tensor(b!)? hits) -> ()")
_library.define(f"suppress(Tensor x, Tensor rows, {SITE_ARGUMENTS}) -> Tensor")
_library.define(f"suppress_backward(Tensor grad, Tensor x, Tensor rows, {SITE_ARGUMENTS}) -> Tensor")
_library.define("scores(Tensor x, Tensor detector, Tensor bias) -> Tensor")


def suppress_(x: Tensor, rows: Tensor, site: SiteTensors, hits: Tensor | None = None) -> None:
    """Remove from each token what the signatures of its capsule set find there, in place.

    x [N, D] with rows [N], or [B, T, D] with rows [B]: fp16, bf16, fp32 (fp32 inside) or float64, any strides that do
    not overlap. rows int32: the capsule set of each token or batch row; -1 leaves it alone. hits [N, C] bool, N = B·T:
    set True where a signature of that capsule had a gate of at least 1/2, never set False.
    Exact: a token on which nothing fires is not written. What happens to a token depends on it and its set alone, bit
    for bit. x is rounded once, at the end. A token with NaN or ±inf fires nothing.
    Raises KernelError for shapes, dtypes or devices that do not fit, or where x needs a gradient (use `suppress`).
    """
    _check(x, rows, site)
    if x.requires_grad and torch.is_grad_enabled():
        raise KernelError("x needs a gradient and suppress_ works in place; use suppress")
    if 0 in x.stride() and any(step == 0 and n > 1 for step, n in zip(x.stride(), x.shape, strict=True)):
        raise KernelError("tokens of x overlap in memory (it was expanded); give a copy")
    if hits is not None and (hits.dtype != torch.bool or hits.dim() != 2 or hits.shape[0] * x.shape[-1] != x.numel()):
        raise KernelError(
            f"hits is {hits.dtype} {list(hits.shape)}; expected torch.bool with a row for each token of x"
        )
    torch.ops.kif.suppress_(x, rows, *site.tensors, hits)


def suppress(x: Tensor, rows: Tensor, site: SiteTensors) -> Tensor:
    """`suppress_` out of place, differentiable in x; same arguments, a new tensor of x's shape and dtype.

    The gradient is that of the reference, taken again in the backward pass so that nothing but x is kept. A hard gate
    has gradient zero, so it passes through the projection only.
    """
    _check(x, rows, site)
    return torch.ops.kif.suppress(x, rows, *site.tensors)


def scores(x: Tensor, site: SiteTensors) -> Tensor:
    """The scores that decide, of every token and slot: x [..., D] -> [..., S] fp32, -inf in free slots."""
    _check_width(x, site)
    flat = torch.ops.kif.scores(x.reshape(-1, x.shape[-1]), site.detector, site.bias)
    return flat.reshape(*x.shape[:-1], flat.shape[-1])


def _check_width(x: Tensor, site: SiteTensors) -> None:
    if x.dtype not in FLOATS:
        raise KernelError(f"x is {x.dtype}; expected fp16, bf16, fp32 or float64")
    if x.dim() == 0 or x.shape[-1] != site.detector.shape[1]:
        raise KernelError(
            f"x is {list(x.shape)} but the site's detectors are {site.detector.shape[1]} wide: another model's?"
        )
    if x.device != site.detector.device:
        raise KernelError(f"x is on {x.device}, the site's tensors are on {site.detector.device}; make the bank there")


def _check(x: Tensor, rows: Tensor, site: SiteTensors) -> None:
    _check_width(x, site)
    if x.dim() not in (2, 3):
        raise KernelError(f"x is {list(x.shape)}; expected [N, D] or [B, T, D]")
    if rows.dtype != torch.int32 or rows.dim() != 1 or rows.shape[0] != x.shape[0]:
        raise KernelError(f"rows is {rows.dtype} {list(rows.shape)}; expected torch.int32 [{x.shape[0]}]")


def _suppress_cpu_(x: Tensor, rows: Tensor, *rest: Any) -> None:
    *tensors, hits = rest
    path = reference.suppress_ if x.dtype == torch.float64 else cpu.suppress_
    if torch.is_autocast_enabled("cpu"):  # it would screen in bf16
        with torch.autocast("cpu", enabled=False):
            path(x, rows, SiteTensors(*tensors), hits)
    else:
        path(x, rows, SiteTensors(*tensors), hits)


def _suppress_elsewhere_(x: Tensor, rows: Tensor, *rest: Any) -> None:
    _warn_of_reference(x.device.type)
    *tensors, hits = rest
    reference.suppress_(x, rows, SiteTensors(*tensors), hits)


@cache
def _warn_of_reference(device: str) -> None:
    warn(
        f"KIF has no kernel for {device} here: its slow reference runs and waits for the device at every call",
        stacklevel=5,
    )


def _suppress_out_of_place(x: Tensor, rows: Tensor, *tensors: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    torch.ops.kif.suppress_(out, rows, *tensors, None)
    return out


def _suppress_backward(grad: Tensor, x: Tensor, rows: Tensor, *tensors: Tensor) -> Tensor:
    with torch.enable_grad():
        again = x.detach().requires_grad_()
        out = reference.suppress(again, rows, SiteTensors(*tensors))
    return torch.autograd.grad(out, again, grad)[0].contiguous()


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
_library.impl("suppress_", _suppress_elsewhere_, "CUDA")
for _device in ("CPU", "CUDA"):
    _library.impl("suppress", _suppress_out_of_place, _device)
    _library.impl("suppress_backward", _suppress_backward, _device)
    _library.impl("scores", reference.scores, _device)
torch.library.register_fake("kif::suppress_", lambda *_: None, lib=_library)
torch.library.register_fake("kif::suppress", _like, lib=_library)
torch.library.register_fake("kif::suppress_backward", _like, lib=_library)
torch.library.register_fake("kif::scores", _like_scores, lib=_library)
torch.library.register_autograd("kif::suppress", _gradients, setup_context=_keep_inputs, lib=_library)
