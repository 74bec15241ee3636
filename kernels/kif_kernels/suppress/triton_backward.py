"""The gradient of `suppress` in Triton: one program per token, which takes the forward pass again.

With y₀ = x, a_s = α_s g_s, p_s = U_s y_{s-1} − c_s and y_s = y_{s-1} − a_s U_sᵀ p_s, and G the gradient in what comes
out, the updates are gone through backwards, for each with q_s = U_s G:

    ∂/∂a_s = −q_s · p_s                          G ← G − a_s U_sᵀ q_s

and each soft gate that fired adds what it lets through, v = x / rms and score_s = w_s · v + b_s:

    ∂/∂x = G + Σ_s ∂/∂a_s α_s k_s g_s (1 − g_s) (w_s − v (w_s · v) / D) / rms

Of the forward pass only p_s is kept, R numbers a signature. Decisions are those of the forward pass, to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import SiteTensors
from .triton_rows import (
    INF,
    NOWHERE,
    gate,
    halved_total,
    normalise,
    row_constants,
    scores_at,
    site_pointers,
    slots_at,
    to_look_at,
    tokens_of,
    unscaling,
)


@triton.jit
def direction(slot, r, basis_ptr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """Row r of a signature's basis, [W] fp32."""
    column = tl.arange(0, W)
    return tl.load(basis_ptr + (slot.to(tl.int64) * R + r) * D + column, mask=column < D, other=0.0).to(tl.float32)


@triton.jit
def gradient_row(
    at, grad_at, token, row, length,
    detector_ptr, bias_ptr, k_ptr, tau_ptr, basis_ptr, target_ptr, strength_ptr, sets_ptr,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, L: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """Pointers [W] to a token and to the gradient in what becomes of it -> the gradient in it, [W] fp32."""
    column = tl.arange(0, W)
    x = tl.load(at, mask=column < D, other=0.0).to(tl.float32)
    scale, rms, v = normalise(x, D, W)
    place, slot = slots_at(tl.arange(0, CHUNK), token, row, length, 0, None, sets_ptr, L, 0)
    known = slot >= 0
    live = tl.sum(known.to(tl.int32), 0)
    scores = scores_at(
        v, 0, live, token, row, length, 0, None, sets_ptr, detector_ptr, bias_ptr, D, W, L, 0, CHUNK, BLOCK
    )
    k = tl.load(k_ptr + slot, mask=known, other=INF)
    weight, fires, hit = gate(scores, k, tl.load(tau_ptr + slot, mask=known, other=0.0))
    strength = tl.load(strength_ptr + slot, mask=known, other=0.0)
    turns = tl.sum(fires.to(tl.int32), 0)

    y, rank = x * scale, tl.arange(0, RANK)
    kept = tl.zeros((CHUNK, RANK), tl.float32)
    waiting = tl.where(fires, place, NOWHERE)
    for turn in range(turns):
        mine = waiting == tl.min(waiting, 0)
        s, a = tl.sum(tl.where(mine, slot, 0), 0), tl.sum(tl.where(mine, strength * weight, 0.0), 0)
        waiting = tl.where(mine, NOWHERE, waiting)
        total = tl.zeros((W,), tl.float32)
        for r in range(R):
            u = direction(s, r, basis_ptr, D, W, R)
            p = halved_total(u * y, W) - tl.load(target_ptr + s * R + r) * scale
            kept = tl.where(mine[:, None] & (rank == r)[None, :], p, kept)
            total += a * p * u
        y -= total

    grad = tl.load(grad_at, mask=column < D, other=0.0).to(tl.float32)
    through = tl.zeros((CHUNK,), tl.float32)
    waiting = tl.where(fires, place, -1)
    for turn in range(turns):
        mine = waiting == tl.max(waiting, 0)
        s, a = tl.sum(tl.where(mine, slot, 0), 0), tl.sum(tl.where(mine, strength * weight, 0.0), 0)
        waiting = tl.where(mine, -1, waiting)
        total = tl.zeros((W,), tl.float32)
        for r in range(R):
            u = direction(s, r, basis_ptr, D, W, R)
            q = halved_total(u * grad, W)
            through -= q * tl.sum(tl.where(mine[:, None] & (rank == r)[None, :], kept, 0.0), 1)
            total += a * q * u
        grad -= total

    soft = fires & (k != INF)
    through = tl.where(soft, through * unscaling(scale) * strength * k * weight * (1.0 - weight), 0.0)
    along = tl.where(soft, through * (scores - tl.load(bias_ptr + slot, mask=known, other=0.0)), 0.0)
    total = tl.zeros((W,), tl.float32)
    for index in range(live):
        mine = tl.arange(0, CHUNK) == index
        s, t = tl.sum(tl.where(mine, slot, 0), 0), tl.sum(tl.where(mine, through, 0.0), 0)
        if t != 0:
            total += t * tl.load(detector_ptr + s.to(tl.int64) * D + column, mask=column < D, other=0.0)
    # read and normalised again: kept so long, v would push others out of the registers (volatile, or it would be kept)
    again, rms, v = normalise(tl.load(at, mask=column < D, other=0.0, volatile=True).to(tl.float32), D, W)
    return grad + (total - v * (tl.sum(along, 0) / D)) * (scale / rms)


@triton.jit(do_not_specialize=["positions"])
def suppress_backward_kernel(
    out_ptr, grad_ptr, x_ptr, rows_ptr, positions, batch_stride, token_stride,
    detector_ptr, bias_ptr, k_ptr, tau_ptr, basis_ptr, target_ptr, strength_ptr, owner_ptr, sets_ptr,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, L: tl.constexpr, H: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """One token. grad and out are contiguous; RANK is R rounded up to a power of two."""
    token, column = tl.program_id(0), tl.arange(0, W)
    batch = token // positions
    row = tl.load(rows_ptr + batch)
    length, listed = to_look_at(token, row, None, sets_ptr, L, H)
    grad_at = grad_ptr + token.to(tl.int64) * D + column
    if length == 0:
        grad = tl.load(grad_at, mask=column < D, other=0.0).to(tl.float32)
    else:
        at = x_ptr + batch.to(tl.int64) * batch_stride + (token % positions).to(tl.int64) * token_stride + column
        grad = gradient_row(
            at, grad_at, token, row, length,
            detector_ptr, bias_ptr, k_ptr, tau_ptr, basis_ptr, target_ptr, strength_ptr, sets_ptr,
            D, W, R, L, CHUNK, BLOCK, RANK,
        )  # fmt: skip
    tl.store(out_ptr + token.to(tl.int64) * D + column, grad.to(out_ptr.dtype.element_ty), mask=column < D)


def suppress_backward(grad: Tensor, x: Tensor, rows: Tensor, site: SiteTensors) -> Tensor:
    """The gradient in x, contiguous, for sets of at most `tuned.LONGEST_CHUNK` signatures."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens, *strides = tokens_of(x)
    if tokens:
        rank = triton.next_power_of_2(site.basis.shape[1])
        with torch.cuda.device_of(x):
            suppress_backward_kernel[(tokens,)](
                out, grad.contiguous(), x, rows, *strides, *site_pointers(site),
                RANK=rank, **row_constants(site, None, x, "backward"),
            )  # fmt: skip
    return out
