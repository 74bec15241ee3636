"""`suppress_` in Triton: a program per token, or, where many tokens share long sets, per tile of tokens.

A token that has nothing to be looked at is not read, and one on which nothing fires is not written. In a tile one
matrix product screens all tokens, so that a detector is read once for the tile and not once for a token; the few on
which something may fire are then done as single tokens are, with the same bits. Nothing here allocates or waits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuned
from ..layout import Candidates, SiteTensors
from .triton_backward import suppress_backward as suppress_backward
from .triton_rows import row_constants, site_pointers, suppress_row, to_look_at, tokens_of
from .triton_screen import may_fire, places, widening


@triton.jit
def suppress_token(
    token, x_ptr, rows_ptr, positions, batch_stride, token_stride, hits_ptr, hits_stride, count_ptr, found_ptr,
    detector_ptr, bias_ptr, k_ptr, tau_ptr, basis_ptr, target_ptr, strength_ptr, owner_ptr, sets_ptr,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, L: tl.constexpr, H: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token from memory to memory: neither read where it has nothing to be looked at, nor written unless fired."""
    batch = token // positions
    row = tl.load(rows_ptr + batch)
    length, listed = to_look_at(token, row, count_ptr, sets_ptr, L, H)
    if length > 0:
        column = tl.arange(0, W)
        at = x_ptr + batch.to(tl.int64) * batch_stride + (token % positions).to(tl.int64) * token_stride + column
        x = tl.load(at, mask=column < D, other=0.0).to(tl.float32)
        x, fired, scale = suppress_row(
            x, token, row, length, listed, hits_ptr, hits_stride, found_ptr,
            detector_ptr, bias_ptr, k_ptr, tau_ptr, basis_ptr, target_ptr, strength_ptr, owner_ptr, sets_ptr,
            D, W, R, L, H, CHUNK, BLOCK,
        )  # fmt: skip
        if fired > 0:
            tl.store(at, x.to(x_ptr.dtype.element_ty), mask=column < D)


@triton.jit(do_not_specialize=["positions", "hits_stride"])
def suppress_kernel(
    x_ptr, rows_ptr, positions, batch_stride, token_stride, hits_ptr, hits_stride, count_ptr, found_ptr,
    detector_ptr, bias_ptr, k_ptr, tau_ptr, basis_ptr, target_ptr, strength_ptr, owner_ptr, sets_ptr,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, L: tl.constexpr, H: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    suppress_token(
        tl.program_id(0), x_ptr, rows_ptr, positions, batch_stride, token_stride, hits_ptr, hits_stride,
        count_ptr, found_ptr,
        detector_ptr, bias_ptr, k_ptr, tau_ptr, basis_ptr, target_ptr, strength_ptr, owner_ptr, sets_ptr,
        D, W, R, L, H, CHUNK, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "positions", "hits_stride", "widening"])
def suppress_tile_kernel(
    x_ptr, rows_ptr, tokens, positions, batch_stride, token_stride, hits_ptr, hits_stride,
    margin_ptr, used_ptr, place_ptr, widening,
    detector_ptr, bias_ptr, k_ptr, tau_ptr, basis_ptr, target_ptr, strength_ptr, owner_ptr, sets_ptr,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, L: tl.constexpr, H: tl.constexpr, S: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of tokens is screened together; tokens on which something may fire are then done one after another."""
    index = tl.arange(0, BLOCK_N)
    token = (tl.program_id(0) * BLOCK_N + index).to(tl.int64)
    batch, position = token // positions, token % positions
    at = x_ptr + batch * batch_stride + position * token_stride
    row = tl.load(rows_ptr + batch, mask=token < tokens, other=-1).to(tl.int64)
    may = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, tl.load(used_ptr), BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        member = places(row, slot, place_ptr, S) >= 0
        live, wanted = tl.max(member.to(tl.int32), 1) > 0, tl.max(member.to(tl.int32), 0) > 0
        if tl.max(live.to(tl.int32), 0) > 0:
            found = member & may_fire(
                at, None, live, slot, wanted, detector_ptr, bias_ptr, k_ptr, tau_ptr, margin_ptr, widening,
                D, BLOCK_N, BLOCK_S, BLOCK_D, PRECISION,
            )  # fmt: skip
            may |= tl.max(found.to(tl.int32), 1)
    waiting = tl.sum(may)
    for turn in range(waiting):
        first = tl.min(tl.where(may > 0, index, BLOCK_N), 0)
        may = tl.where(index == first, 0, may)
        suppress_token(
            tl.program_id(0) * BLOCK_N + first, x_ptr, rows_ptr, positions, batch_stride, token_stride,
            hits_ptr, hits_stride, None, None,
            detector_ptr, bias_ptr, k_ptr, tau_ptr, basis_ptr, target_ptr, strength_ptr, owner_ptr, sets_ptr,
            D, W, R, L, H, CHUNK, BLOCK,
        )  # fmt: skip


def suppress_(
    x: Tensor, rows: Tensor, site: SiteTensors, hits: Tensor | None = None, candidates: Candidates | None = None
) -> None:
    """`kif_kernels.suppress_` for fp16, bf16 and fp32 tensors on a GPU."""
    tokens, positions, *strides = tokens_of(x)
    if tokens == 0:
        return
    marks = (None, 0) if hits is None else (hits.view(torch.int8), hits.stride(0))
    signatures, constants = (*site_pointers(site),), row_constants(site, candidates, x)
    with torch.cuda.device_of(x):
        if candidates is not None:
            suppress_kernel[(tokens,)](
                x, rows, positions, *strides, *marks, candidates.count, candidates.found, *signatures, **constants
            )
        elif tuned.in_tiles(tokens, site.sets.shape[1], x):
            config = tuned.tile_config("suppress", tokens, x)
            constants.pop("maxnreg", None)  # it is for the warps of a row kernel
            suppress_tile_kernel[(triton.cdiv(tokens, config["BLOCK_N"]),)](
                x, rows, tokens, positions, *strides, *marks,
                site.margin, site.used, site.place, widening(x.shape[-1], config["PRECISION"]),
                *signatures, S=site.detector.shape[0], **constants | config,
            )  # fmt: skip
        else:
            suppress_kernel[(tokens,)](x, rows, positions, *strides, *marks, None, None, *signatures, **constants)
