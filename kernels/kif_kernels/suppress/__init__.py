"""The operator `suppress_`: check, choose the path, call. Registered as torch.ops.kif.*, so that graphs keep it."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from ..checks import check_hits, check_in_place, check_tokens, check_width
from ..layout import SITE_ARGUMENTS, SiteTensors
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
    check_tokens(x, rows, site)
    check_in_place(x, otherwise="use suppress")
    check_hits(hits, x)
    torch.ops.kif.suppress_(x, rows, *site.tensors, hits)


def suppress(x: Tensor, rows: Tensor, site: SiteTensors) -> Tensor:
    """`suppress_` out of place, differentiable in x; same arguments, a new tensor of x's shape and dtype.

    The gradient is that of the reference, taken again in the backward pass so that nothing but x is kept. A hard gate
    has gradient zero, so it passes through the projection only.
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


def _suppress_cpu_(x: Tensor, rows: Tensor, *rest: Any) -> None:
    *tensors, hits = rest
    path = reference.suppress_ if x.dtype == torch.float64 else cpu.suppress_
    with without_autocast("cpu"):
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
