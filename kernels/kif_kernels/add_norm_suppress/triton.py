"""The fused operator in Triton: one launch and one program per token, which stays in registers from add to norm.

Per token hidden and residual are read once and written once, and the detectors of its set come from the cache; up to 64
signatures nothing else is launched. Orders of summation are those of `suppress/triton.py`, the norm's included, so that
a token gets the same bits in any batch and under any configuration.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import Candidates, SiteTensors
from ..suppress.triton_rows import halved_total, row_constants, site_pointers, suppress_row, to_look_at, tokens_of


@triton.jit
def norm_row(x, weight_ptr, epsilon, ONE_PLUS: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """x [W] fp32, 0 past D -> its norm, [W] fp32, rounded as `reference.norm` rounds before the last step."""
    column = tl.arange(0, W)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0)
    variance = tl.div_rn(halved_total(x * x, W), tl.full((), D, tl.float32))
    x = x * tl.div_rn(tl.full((), 1.0, tl.float32), tl.sqrt_rn(variance + epsilon))
    if ONE_PLUS:
        return x * (weight.to(tl.float32) + 1.0)
    # a product of two numbers of the weight's dtype is exact in fp32 and rounded once, as in that dtype
    return (x.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)).to(weight.dtype).to(tl.float32)


@triton.jit(do_not_specialize=["positions", "hits_stride", "epsilon"])
def add_norm_suppress_kernel(
    hidden_ptr, residual_ptr, weight_ptr, epsilon, rows_ptr, positions,
    hidden_batch_stride, hidden_token_stride, residual_batch_stride, residual_token_stride,
    hits_ptr, hits_stride, count_ptr, found_ptr,
    detector_ptr, bias_ptr, k_ptr, tau_ptr, basis_ptr, target_ptr, strength_ptr, owner_ptr, sets_ptr,
    ONE_PLUS: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, L: tl.constexpr, H: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    batch, position = (token // positions).to(tl.int64), (token % positions).to(tl.int64)
    column = tl.arange(0, W)
    hidden_at = hidden_ptr + batch * hidden_batch_stride + position * hidden_token_stride + column
    residual_at = residual_ptr + batch * residual_batch_stride + position * residual_token_stride + column
    x = tl.load(hidden_at, mask=column < D, other=0.0).to(tl.float32)
    x += tl.load(residual_at, mask=column < D, other=0.0).to(tl.float32)
    row = tl.load(rows_ptr + batch)
    length, listed = to_look_at(token, row, count_ptr, sets_ptr, L, H)
    if length > 0:
        x, fired, scale = suppress_row(
            x, token, row, length, listed, hits_ptr, hits_stride, found_ptr,
            detector_ptr, bias_ptr, k_ptr, tau_ptr, basis_ptr, target_ptr, strength_ptr, owner_ptr, sets_ptr,
            D, W, R, L, H, CHUNK, BLOCK,
        )  # fmt: skip
        if (fired == 0) & (scale != 1.0):  # read again: kept for this rare case, it would cost registers in all others
            x = tl.load(hidden_at, mask=column < D, other=0.0, volatile=True).to(tl.float32)
            x += tl.load(residual_at, mask=column < D, other=0.0, volatile=True).to(tl.float32)
    tl.store(residual_at, x.to(residual_ptr.dtype.element_ty), mask=column < D)
    normed = norm_row(x, weight_ptr, epsilon, ONE_PLUS, D, W)
    tl.store(hidden_at, normed.to(hidden_ptr.dtype.element_ty), mask=column < D)


@triton.jit(do_not_specialize=["positions", "hits_stride", "epsilon"])
def suppress_normed_kernel(
    normed_ptr, residual_ptr, weight_ptr, epsilon, rows_ptr, positions,
    normed_batch_stride, normed_token_stride, residual_batch_stride, residual_token_stride,
    hits_ptr, hits_stride, count_ptr, found_ptr,
    detector_ptr, bias_ptr, k_ptr, tau_ptr, basis_ptr, target_ptr, strength_ptr, owner_ptr, sets_ptr,
    ONE_PLUS: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, L: tl.constexpr, H: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    batch, position = (token // positions).to(tl.int64), (token % positions).to(tl.int64)
    row = tl.load(rows_ptr + batch)
    length, listed = to_look_at(token, row, count_ptr, sets_ptr, L, H)
    if length > 0:
        column = tl.arange(0, W)
        residual_at = residual_ptr + batch * residual_batch_stride + position * residual_token_stride + column
        x = tl.load(residual_at, mask=column < D, other=0.0).to(tl.float32)
        x, fired, scale = suppress_row(
            x, token, row, length, listed, hits_ptr, hits_stride, found_ptr,
            detector_ptr, bias_ptr, k_ptr, tau_ptr, basis_ptr, target_ptr, strength_ptr, owner_ptr, sets_ptr,
            D, W, R, L, H, CHUNK, BLOCK,
        )  # fmt: skip
        if fired > 0:
            tl.store(residual_at, x.to(residual_ptr.dtype.element_ty), mask=column < D)
            normed = norm_row(x, weight_ptr, epsilon, ONE_PLUS, D, W)
            normed_at = normed_ptr + batch * normed_batch_stride + position * normed_token_stride + column
            tl.store(normed_at, normed.to(normed_ptr.dtype.element_ty), mask=column < D)


def _launch(
    kernel: triton.JITFunction,
    first: Tensor,
    residual: Tensor,
    rows: Tensor,
    site: SiteTensors,
    weight: Tensor,
    epsilon: float,
    one_plus: bool,
    hits: Tensor | None,
    candidates: Candidates | None,
) -> None:
    count, positions, *strides = tokens_of(first)
    if count == 0:
        return
    with torch.cuda.device_of(first):
        kernel[(count,)](
            first, residual, weight, epsilon, rows, positions, *strides, *tokens_of(residual)[2:],
            None if hits is None else hits.view(torch.int8), 0 if hits is None else hits.stride(0),
            None if candidates is None else candidates.count, None if candidates is None else candidates.found,
            *site_pointers(site), ONE_PLUS=one_plus, **row_constants(site, candidates, first),
        )  # fmt: skip


def add_norm_suppress_(*arguments: Any) -> None:
    _launch(add_norm_suppress_kernel, *arguments)


def suppress_normed_(*arguments: Any) -> None:
    _launch(suppress_normed_kernel, *arguments)
