"""What every operator refuses before it starts, in one line: KernelError says what was expected and what came."""

import os

import torch
from torch import Tensor

from .layout import FLOATS, Candidates, KernelError, SiteTensors

# KIF_DEBUG=1 also looks into the tensors, which waits for the device at every call.
DEBUG = os.environ.get("KIF_DEBUG", "") not in ("", "0")


def check_width(x: Tensor, site: SiteTensors, name: str = "x") -> None:
    """x [..., D] of a float dtype, as wide as the site's detectors and on their device."""
    if x.dtype not in FLOATS:
        raise KernelError(f"{name} is {x.dtype}; expected fp16, bf16, fp32 or float64")
    if x.dim() == 0 or x.shape[-1] != site.detector.shape[1]:
        raise KernelError(
            f"{name} is {list(x.shape)} but the site's detectors are {site.detector.shape[1]} wide: another model's?"
        )
    if x.device != site.detector.device:
        raise KernelError(
            f"{name} is on {x.device}, the site's tensors are on {site.detector.device}; make the bank there"
        )


def check_tokens(x: Tensor, rows: Tensor, site: SiteTensors, name: str = "x") -> None:
    """x [N, D] with rows [N], or [B, T, D] with rows [B]; on a GPU the last dimension must be contiguous."""
    check_width(x, site, name)
    if x.dim() not in (2, 3):
        raise KernelError(f"{name} is {list(x.shape)}; expected [N, D] or [B, T, D]")
    check_last_dimension(x, name)
    if rows.dtype != torch.int32 or rows.dim() != 1 or rows.shape[0] != x.shape[0] or rows.device != x.device:
        got, expected = f"{rows.dtype} {list(rows.shape)} on {rows.device}", f"torch.int32 [{x.shape[0]}] on {x.device}"
        raise KernelError(f"rows is {got}; expected {expected}")
    if x.device.type != "cpu" and not rows.is_contiguous():
        raise KernelError(f"rows has stride {rows.stride(0)}; on {x.device} it must be contiguous: give a copy")
    if DEBUG and rows.numel() and not -1 <= int(rows.min()) <= int(rows.max()) < site.sets.shape[0]:
        got = f"{int(rows.min())} to {int(rows.max())}"
        raise KernelError(f"rows holds {got}; the site has capsule sets 0 to {site.sets.shape[0] - 1}, and -1 for none")


def check_last_dimension(x: Tensor, name: str = "x") -> None:
    if x.device.type != "cpu" and x.stride(-1) != 1 and x.shape[-1] > 1:
        raise KernelError(f"{name} has strides {list(x.stride())}; on {x.device} the last must be 1: give a copy")


def check_in_place(x: Tensor, name: str = "x", otherwise: str = "give a copy that needs none") -> None:
    """x can be written: it needs no gradient and its entries do not share memory."""
    if x.requires_grad and torch.is_grad_enabled():
        raise KernelError(f"{name} needs a gradient and is written in place; {otherwise}")
    if 0 in x.stride() and any(step == 0 and n > 1 for step, n in zip(x.stride(), x.shape, strict=True)):
        raise KernelError(f"tokens of {name} overlap in memory (it was expanded); give a copy")


def check_like(y: Tensor, x: Tensor, name: str, other: str) -> None:
    """y has the shape, dtype and device of x, and may be read as x is."""
    if (y.shape, y.dtype, y.device) != (x.shape, x.dtype, x.device):
        got, expected = (f"{t.dtype} {list(t.shape)} on {t.device}" for t in (y, x))
        raise KernelError(f"{name} is {got}; expected {expected}, as {other} is")
    check_last_dimension(y, name)


def check_hits(hits: Tensor | None, x: Tensor, site: SiteTensors) -> None:
    """hits [N, C] bool, a row for each token of x and a column for each capsule."""
    if hits is None:
        return
    if hits.dtype != torch.bool or hits.dim() != 2 or hits.shape[0] * x.shape[-1] != x.numel():
        raise KernelError(
            f"hits is {hits.dtype} {list(hits.shape)}; expected torch.bool with a row for each token of x"
        )
    if hits.device != x.device or (hits.device.type != "cpu" and hits.stride(1) != 1):
        raise KernelError(f"hits is on {hits.device}, strides {list(hits.stride())}; expected {x.device}, the last 1")
    if DEBUG and site.owner.numel() and int(site.owner.max()) >= hits.shape[1]:
        raise KernelError(f"hits has {hits.shape[1]} columns; the site's capsules go to number {int(site.owner.max())}")


def check_candidates(candidates: Candidates | None, x: Tensor) -> None:
    """int32 [N] and [N, H] for the N tokens of x, and on its device."""
    if candidates is None:
        return
    tokens = x.shape[:-1].numel()
    shapes = {"count": [tokens], "found": [tokens, *candidates.found.shape[1:2]], "work": [tokens, 2]}
    for name, shape in shapes.items():
        tensor = getattr(candidates, name)
        if tensor is None:
            continue
        if list(tensor.shape) != shape or tensor.dtype != torch.int32 or tensor.device != x.device:
            got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise KernelError(f"candidates.{name} is {got}; expected torch.int32 {shape} on {x.device}")
        if not tensor.is_contiguous():
            raise KernelError(f"candidates.{name} has strides {list(tensor.stride())}; it must be contiguous")
    if candidates.found.dim() != 2 or candidates.found.shape[1] == 0:
        raise KernelError("candidates.found must be [N, H] with H over 0")
