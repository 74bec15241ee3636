"""What every operator refuses before it starts, in one line: KernelError says what was expected and what came."""

from torch import Tensor, bool, int32, is_grad_enabled

from .layout import FLOATS, KernelError, SiteTensors


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
    """x [N, D] with rows [N], or [B, T, D] with rows [B]."""
    check_width(x, site, name)
    if x.dim() not in (2, 3):
        raise KernelError(f"{name} is {list(x.shape)}; expected [N, D] or [B, T, D]")
    if rows.dtype != int32 or rows.dim() != 1 or rows.shape[0] != x.shape[0]:
        raise KernelError(f"rows is {rows.dtype} {list(rows.shape)}; expected torch.int32 [{x.shape[0]}]")
    if rows.device != x.device:
        raise KernelError(f"rows is on {rows.device}, {name} is on {x.device}; move one of them")


def check_in_place(x: Tensor, name: str = "x", otherwise: str = "give a copy that needs none") -> None:
    """x can be written: it needs no gradient and its entries do not share memory."""
    if x.requires_grad and is_grad_enabled():
        raise KernelError(f"{name} needs a gradient and is written in place; {otherwise}")
    if 0 in x.stride() and any(step == 0 and n > 1 for step, n in zip(x.stride(), x.shape, strict=True)):
        raise KernelError(f"tokens of {name} overlap in memory (it was expanded); give a copy")


def check_hits(hits: Tensor | None, x: Tensor) -> None:
    """hits [N, C] bool, a row for each token of x."""
    if hits is not None and (hits.dtype != bool or hits.dim() != 2 or hits.shape[0] * x.shape[-1] != x.numel()):
        raise KernelError(
            f"hits is {hits.dtype} {list(hits.shape)}; expected torch.bool with a row for each token of x"
        )
