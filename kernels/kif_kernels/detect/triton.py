"""`detect` in Triton: a program per tile of tokens and signatures; what may fire goes into the tokens' lists.

A tile takes its places in the lists with an atomic addition, so that the order in a list is accidental, and whoever
reads it goes by the set's order. A tile in which no token has a signature reads no token.

One launch: nothing is set to 0 before it. The sums are formed in `work`, and of the tiles that share tokens the last
to arrive writes them to `count` and leaves zeros. It knows that it is the last from a counter that is added to after a
barrier and with release and acquire, so it sees what all others have added.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuned
from ..layout import Candidates, SiteTensors
from ..suppress.triton_rows import OPTIONS, tokens_of
from ..suppress.triton_screen import may_fire, places, widening


@triton.jit(do_not_specialize=["tokens", "positions", "widening"])
def detect_kernel(
    x_ptr, residual_ptr, rows_ptr, tokens, positions,
    x_batch_stride, x_token_stride, residual_batch_stride, residual_token_stride,
    detector_ptr, bias_ptr, k_ptr, tau_ptr, margin_ptr, place_ptr, widening, count_ptr, found_ptr, work_ptr,
    D: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    token = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    batch, position = token // positions, token % positions
    row = tl.load(rows_ptr + batch, mask=token < tokens, other=-1).to(tl.int64)
    member = (places(row, slot, place_ptr, S) >= 0).to(tl.int32)
    live, wanted = tl.max(member, 1) > 0, tl.max(member, 0) > 0
    if tl.max(live.to(tl.int32), 0) > 0:
        at, residual_at = x_ptr + batch * x_batch_stride + position * x_token_stride, None
        if residual_ptr is not None:
            residual_at = residual_ptr + batch * residual_batch_stride + position * residual_token_stride
        may = may_fire(
            at, residual_at, live, slot, wanted, detector_ptr, bias_ptr, k_ptr, tau_ptr, margin_ptr, widening,
            D, BLOCK_N, BLOCK_S, BLOCK_D, PRECISION,
        )  # fmt: skip
        place = places(row, slot, place_ptr, S)  # again: kept, it would take the product's registers
        listed = (may & (place >= 0)).to(tl.int32)
        here = tl.sum(listed, 1)
        if tl.max(here, 0) > 0:
            first = tl.atomic_add(work_ptr + token * 2, here, mask=here > 0, sem="relaxed")
            entry = first[:, None] + tl.cumsum(listed, 1) - 1
            tl.store(found_ptr + token[:, None] * H + entry, place, mask=(listed > 0) & (entry < H))
    tl.debug_barrier()
    arrived_ptr = work_ptr + tl.program_id(0) * 2 + 1
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        total = tl.atomic_xchg(work_ptr + token * 2, tl.zeros((BLOCK_N,), tl.int32), mask=token < tokens)
        tl.store(count_ptr + token, total, mask=token < tokens)
        tl.store(arrived_ptr, 0)


def detect(x: Tensor, rows: Tensor, site: SiteTensors, candidates: Candidates, residual: Tensor | None = None) -> None:
    """`kif_kernels.detect` for fp16, bf16 and fp32 tensors on a GPU, in one launch."""
    tokens, positions, *strides = tokens_of(x)
    if tokens == 0:
        return
    slots, width = site.detector.shape
    config = tuned.tile_config("detect", tokens, x)
    # tiles of tokens first: they share the detectors of a tile of signatures, which are then read from memory once
    grid = (triton.cdiv(tokens, config["BLOCK_N"]), max(1, triton.cdiv(slots, config["BLOCK_S"])))
    with torch.cuda.device_of(x):
        detect_kernel[grid](
            x, residual, rows, tokens, positions, *strides, *((0, 0) if residual is None else tokens_of(residual)[2:]),
            site.detector, site.bias, site.k, site.tau, site.margin, site.place,
            widening(width, config["PRECISION"]), candidates.count, candidates.found, candidates.work,
            D=width, S=slots, H=candidates.found.shape[1], **config, **OPTIONS,
        )  # fmt: skip
