"""The operator on one token in Triton: the steps that the kernels of every op share. The token stays in registers.

What decides, and what is removed, is summed in the order of `reference.ordered_sum`, by hand: the order of `tl.sum`
depends on the tile's layout, that is on the number of warps. So a token gets the same decisions as on the CPU, and the
same bits in any batch and under any configuration.
"""

import triton
import triton.language as tl
from torch import Tensor

from .. import layout, tuned
from ..layout import Candidates, SiteTensors
from . import reference

EPSILON = tl.constexpr(reference.EPSILON)
LARGE, SHRINK = tl.constexpr(reference.LARGE), tl.constexpr(reference.SHRINK)
LOG_1023 = tl.constexpr(layout.LOG_1023)
INF = tl.constexpr(float("inf"))
NOWHERE = tl.constexpr(1 << 30)  # past any place in a capsule set
# A product fused into the addition after it would not be rounded; on the CPU it is.
OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def halved_sum(t, S: tl.constexpr, W: tl.constexpr):
    """t [S, W] -> [S], W a power of two: `reference.ordered_sum`."""
    for i in tl.static_range(16):
        if W >> i > 1:
            t = tl.sum(tl.reshape(t, (S, 2, W >> (i + 1))), 1)
    return tl.reshape(t, (S,))


@triton.jit
def halved_total(t, W: tl.constexpr):
    """t [W] -> its sum, in the same order."""
    return tl.sum(halved_sum(tl.reshape(t, (1, W)), 1, W), 0)


@triton.jit
def normalise(x, D: tl.constexpr, W: tl.constexpr):
    """x [W] fp32, 0 past D -> (scale, rms of x·scale, v): `reference.normalise`."""
    scale = tl.where(tl.max(tl.abs(x), 0) < LARGE, 1.0, SHRINK)
    y = x * scale
    mean = tl.div_rn(halved_total(y * y, W), tl.full((), D, tl.float32))
    rms = tl.sqrt_rn(mean + EPSILON * scale * scale)
    return scale, rms, tl.div_rn(y, tl.zeros_like(y) + rms)


@triton.jit
def score(v, slot, detector_ptr, bias_ptr, D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    """v [W], slot [BLOCK] -> [BLOCK], -inf where slot is -1: `reference.score`."""
    column = tl.arange(0, W)
    live = slot >= 0
    at = detector_ptr + slot.to(tl.int64)[:, None] * D + column[None, :]
    w = tl.load(at, mask=live[:, None] & (column < D)[None, :], other=0.0)
    return halved_sum(w * v[None, :], BLOCK, W) + tl.load(bias_ptr + slot, mask=live, other=-INF)


@triton.jit
def gate(score, k, tau):
    """[S] each -> (weight, whether it is over 0, whether it is at least 1/2): `reference.gate`, on scores or -inf."""
    hard = k == INF
    z = tl.where(hard, score, k * (score - tau))
    weight = tl.where(hard, 1.0, tl.div_rn(tl.full(z.shape, 1.0, tl.float32), 1.0 + tl.exp(-z)))
    return weight, tl.where(hard, z > 0, z >= -LOG_1023), tl.where(hard, z > 0, z >= 0)


@triton.jit
def removed(y, scale, slot, amount, basis_ptr, target_ptr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """amount · Uᵀ (U y − c·scale), [W]: `reference.removed`."""
    column = tl.arange(0, W)
    total = tl.zeros((W,), tl.float32)
    for r in range(R):
        u = tl.load(basis_ptr + (slot.to(tl.int64) * R + r) * D + column, mask=column < D, other=0.0).to(tl.float32)
        total += amount * (halved_total(u * y, W) - tl.load(target_ptr + slot * R + r) * scale) * u
    return total


@triton.jit
def to_look_at(token, row, count_ptr, sets_ptr, L: tl.constexpr, H: tl.constexpr):
    """(how many signatures to decide on, how many of them are listed: all or, where the whole set is meant, none)."""
    length, listed = 0, 0
    if row >= 0:
        if count_ptr is None:
            length = tl.where(tl.load(sets_ptr + row.to(tl.int64) * L) >= 0, L, 0)
        else:
            count = tl.load(count_ptr + token)
            length, listed = tl.where(count > H, L, count), tl.where(count > H, 0, count)
    return length, listed


@triton.jit
def slots_at(offset, token, row, length, listed, found_ptr, sets_ptr, L: tl.constexpr, H: tl.constexpr):
    """offset [n] into what is to be looked at -> (place in the set, slot or -1), both [n]."""
    place = offset
    if found_ptr is not None:
        found = tl.load(found_ptr + token.to(tl.int64) * H + offset, mask=offset < listed, other=0)
        place = tl.where(listed > 0, found, offset)
    return place, tl.load(sets_ptr + row.to(tl.int64) * L + place, mask=offset < length, other=-1)


@triton.jit
def scores_at(
    v, start, live, token, row, length, listed, found_ptr, sets_ptr, detector_ptr, bias_ptr,
    D: tl.constexpr, W: tl.constexpr, L: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The scores [CHUNK] of the `live` signatures from `start` on, -inf after them."""
    index = tl.arange(0, CHUNK)
    scores = tl.full((CHUNK,), -INF, tl.float32)
    for first in range(0, live, BLOCK):
        some = start + first + tl.arange(0, BLOCK)
        place, slot = slots_at(some, token, row, length, listed, found_ptr, sets_ptr, L, H)
        block = score(v, slot, detector_ptr, bias_ptr, D, W, BLOCK)
        block = tl.reshape(tl.broadcast_to(block[None, :], (CHUNK // BLOCK, BLOCK)), (CHUNK,))
        scores = tl.where(index // BLOCK == first // BLOCK, block, scores)
    return scores


@triton.jit
def suppress_row(
    x, token, row, length, listed, hits_ptr, hits_stride, found_ptr,
    detector_ptr, bias_ptr, k_ptr, tau_ptr, basis_ptr, target_ptr, strength_ptr, owner_ptr, sets_ptr,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, L: tl.constexpr, H: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [W] fp32 of one token -> (its new value, how many signatures fired, scale), deciding on CHUNK at a time.

    Where none fired the value is x, but for a scale other than 1, which may have lost the smallest entries of it.
    """
    scale, rms, v = normalise(x, D, W)
    y = x * scale
    fired, start, live = 0, 0, CHUNK
    while (live == CHUNK) & (start < length):
        offset = start + tl.arange(0, CHUNK)
        place, slot = slots_at(offset, token, row, length, listed, found_ptr, sets_ptr, L, H)
        known = slot >= 0
        live = tl.sum(known.to(tl.int32), 0)
        scores = scores_at(
            v, start, live, token, row, length, listed, found_ptr, sets_ptr, detector_ptr, bias_ptr,
            D, W, L, H, CHUNK, BLOCK,
        )  # fmt: skip
        k = tl.load(k_ptr + slot, mask=known, other=INF)
        weight, fires, hit = gate(scores, k, tl.load(tau_ptr + slot, mask=known, other=0.0))
        if hits_ptr is not None:
            owner = tl.load(owner_ptr + slot, mask=known, other=0)
            tl.store(hits_ptr + token.to(tl.int64) * hits_stride + owner, 1, mask=hit)
        amount = tl.load(strength_ptr + slot, mask=known, other=0.0) * weight
        waiting = tl.where(fires, place, NOWHERE)
        turns = tl.sum(fires.to(tl.int32), 0)
        for turn in range(turns):  # in the set's order, whatever the order of the candidates
            mine = waiting == tl.min(waiting, 0)
            s, a = tl.sum(tl.where(mine, slot, 0), 0), tl.sum(tl.where(mine, amount, 0.0), 0)
            waiting = tl.where(mine, NOWHERE, waiting)
            y -= removed(y, scale, s, a, basis_ptr, target_ptr, D, W, R)
        fired += turns
        start += CHUNK
    return y * unscaling(scale), fired, scale


@triton.jit
def unscaling(scale):
    """1 / scale, which is exact."""
    return tl.where(scale == 1.0, 1.0, 1.0 / SHRINK)


def tokens_of(x: Tensor) -> tuple[int, int, int, int]:
    """x [N, D] or [B, T, D] -> (N or B·T, T or 1, stride of a batch row, stride of a position)."""
    if x.dim() == 2:
        return x.shape[0], 1, x.stride(0), 0
    return x.shape[0] * x.shape[1], max(1, x.shape[1]), x.stride(0), x.stride(1)


def site_pointers(site: SiteTensors) -> tuple[Tensor, ...]:
    """The tensors that every row kernel takes, in its order."""
    return (
        site.detector, site.bias, site.k, site.tau, site.basis,
        site.target, site.strength, site.owner, site.sets,
    )  # fmt: skip


def row_constants(
    site: SiteTensors, candidates: Candidates | None, x: Tensor, kernel: str = "row"
) -> dict[str, object]:
    """The compile-time arguments of a row kernel for tokens x of this site, its warps, and what turns fusion off."""
    width, length = site.detector.shape[1], site.sets.shape[1]
    limit = 0 if candidates is None else candidates.found.shape[1]
    chunk = triton.next_power_of_2(limit or min(length, tuned.LONGEST_CHUNK))
    sizes = {"D": width, "W": triton.next_power_of_2(width), "R": site.basis.shape[1], "L": length, "H": limit}
    return sizes | {"CHUNK": chunk, **tuned.row_config(kernel, width, chunk, x), **OPTIONS}
