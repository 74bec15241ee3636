"""How deep an erasure goes: states of another model are put into the untouched one where it is about to say the answer.

Block by block, what that costs the answer is compared with what the states of a model that never knew it cost.

Source: arXiv 2605.24614 (Unlearning Depth Score). Δ_l is the mean drop in log p of the answer's tokens when block l's
output is replaced at the positions that predict them; UDS = Σ Δ^S1_l · clip(Δ^S2_l / Δ^S1_l, 0, 1) / Σ Δ^S1_l over the
blocks where the source S1 that never knew drops it by more than 0.05. 1: as deep as never known; 0: all is still there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks import decoder_blocks
from .facts import keeping

LEAST_DROP = 0.05


@torch.inference_mode()
def answer_states(model: Any, ids: Sequence[int], length: int) -> Tensor:
    """[L, A, D] fp32: each block's output at the positions that predict the last A = `length` tokens of `ids`."""
    kept: list[Tensor] = []
    where = slice(len(ids) - length - 1, len(ids) - 1)

    def note(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        kept.append(hidden[0, where].float().cpu())

    handles = [block.register_forward_hook(note) for block in decoder_blocks(model)]
    try:
        device = next(model.parameters()).device
        model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False, **keeping(model, 1))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(kept)


@torch.inference_mode()
def patched_log_probs(model: Any, ids: Sequence[int], length: int, states: Tensor, rows: int = 32) -> Tensor:
    """[L]: mean log p of the last `length` tokens of `ids` when block l's output at the positions that predict them is
    states[l] [A, D], for the first L = len(states) blocks. They are patched side by side, `rows` in one forward."""
    blocks, start = decoder_blocks(model), len(ids) - length - 1
    device = next(model.parameters()).device
    row = torch.tensor([list(ids)], device=device)
    wanted = row[0, start + 1 :].cpu()
    found = []
    for first in range(0, len(states), rows):
        some = range(first, min(first + rows, len(states)))
        options = {} if start == 0 else {"past_key_values": _read(model, row[:, :start], len(some))}
        handles = [blocks[b].register_forward_hook(_patch(n, length, states[b])) for n, b in enumerate(some)]
        try:
            logits = model(input_ids=row[:, start:].expand(len(some), -1), **options).logits[:, :length]
        finally:
            for handle in handles:
                handle.remove()
        log_probs = logits.float().cpu().log_softmax(-1)
        found.append(log_probs.gather(-1, wanted.expand(len(some), -1)[..., None])[..., 0].mean(-1))
    return torch.cat(found)


def _read(model: Any, ids: Tensor, rows: int) -> Any:
    """The cache after ids [1, T], for so many rows: what comes before the patched positions is the same in all."""
    cache = model(input_ids=ids, use_cache=True, **keeping(model, 1)).past_key_values
    cache.batch_repeat_interleave(rows)
    return cache


def _patch(row: int, length: int, states: Tensor) -> Any:
    """The first `length` positions of a row become `states`."""

    def put(module: Any, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[row, :length] = states.to(hidden.device, hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return put


def depth_score(drop: Tensor, never_knew: Tensor, least: float = LEAST_DROP) -> float | None:
    """UDS of drops [L] per block, given those of a source that never knew; None where no block of it drops enough."""
    counted = never_knew > least
    if not counted.any():
        return None
    weight = never_knew[counted].double()
    return float((weight * (drop[counted].double() / weight).clamp(0, 1)).sum() / weight.sum())
