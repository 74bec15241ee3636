"""The screen in Triton: which signatures may fire on a tile of tokens, from one tiled matrix product.

It only rules out: its floor lies under the gate's by more than every rounding difference between it and the decision,
so no hit is missed, and what it lets through is decided again in fixed order.

How far: `screening_margin` allows 2·γ_{D+32}·‖w‖√D for two fp32 sums in any order. Tensor cores are coarser. They read
the operands as TF32, each up to 2⁻¹⁰ too small, which moves a product by at most 2⁻⁹. And they cut instead of rounding:
each addend, D products and a running sum for every four of them, by up to 2⁻²² of all that is added up. That is 5·γ
where the margin counted one. Together at most 2·γ·(1 + 2 + 2⁻¹⁰/γ); `widening` takes 3 + 2⁻⁹·⁹⁹/γ.
"""

import triton
import triton.language as tl

from .. import layout
from . import reference

EPSILON = tl.constexpr(reference.EPSILON)
LOG_1023 = tl.constexpr(layout.LOG_1023)
SAFE_SQUARE = tl.constexpr(2.0**100)  # below this sum of squares nothing overflows


def widening(width: int, precision: str) -> float:
    """What the margins are multiplied by; `precision` is that of `tl.dot`: "tf32" or "ieee"."""
    return 3.0 + (2.0**-9.99 / layout.gamma(width) if precision == "tf32" else 0.0)


@triton.jit
def load_tile(at, live, column, residual_at, D: tl.constexpr):
    """Pointers [n] to tokens, live [n], column [BLOCK_D] -> their columns in fp32, the residual's added, 0 outside."""
    mask = live[:, None] & (column < D)[None, :]
    x = tl.load(at[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_at is not None:
        x += tl.load(residual_at[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def may_fire(
    at, residual_at, live, slot, wanted, detector_ptr, bias_ptr, k_ptr, tau_ptr, margin_ptr, widening,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pointers [BLOCK_N] to tokens, slots [BLOCK_S], and which of them matter -> [BLOCK_N, BLOCK_S]: not ruled out."""
    product = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        x = load_tile(at, live, column, residual_at, D)
        w_at = detector_ptr + slot.to(tl.int64)[None, :] * D + column[:, None]
        w = tl.load(w_at, mask=wanted[None, :] & (column < D)[:, None], other=0.0)
        product = tl.dot(x, w, product, input_precision=PRECISION)
        square += tl.sum(x * x, 1)
    floor = tl.load(margin_ptr + slot, mask=wanted, other=0.0) * widening
    floor += LOG_1023 / tl.load(k_ptr + slot, mask=wanted, other=1.0)
    floor += tl.load(bias_ptr + slot, mask=wanted, other=0.0) - tl.load(tau_ptr + slot, mask=wanted, other=0.0)
    below = product * tl.rsqrt(square / D + EPSILON)[:, None] + floor[None, :] <= 0  # NaN is not below
    safe = square < SAFE_SQUARE  # nor is anything where squares might overflow
    return ~(below & safe[:, None])


@triton.jit
def places(row, slot, place_ptr, S: tl.constexpr):
    """Capsule-set rows [n] or -1, slots [m] -> the place of each slot in each set, -1 where it is not in it."""
    known = (row >= 0)[:, None] & (slot < S)[None, :]
    return tl.load(place_ptr + row[:, None] * S + slot[None, :], mask=known, other=-1)
