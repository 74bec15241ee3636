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
        _forward(model, torch.tensor([list(ids)]), 1)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(kept)


@torch.inference_mode()
def patched_log_probs(model: Any, ids: Sequence[int], length: int, states: Tensor, rows: int = 32) -> Tensor:
    """[L]: mean log p of the last `length` tokens of `ids` when block l's output at the positions that predict them is
    states[l] [A, D], for the first L = len(states) blocks. They are patched side by side, `rows` in one forward."""
    blocks = decoder_blocks(model)
    where = slice(len(ids) - length - 1, len(ids) - 1)
    wanted = torch.tensor(list(ids)[len(ids) - length :])
    found = []
    for start in range(0, len(states), rows):
        some = range(start, min(start + rows, len(states)))
        handles = [blocks[b].register_forward_hook(_patch(row, where, states[b])) for row, b in enumerate(some)]
        try:
            logits = _forward(model, torch.tensor([list(ids)] * len(some)), length + 1)[:, -length - 1 : -1]
        finally:
            for handle in handles:
                handle.remove()
        log_probs = logits.float().cpu().log_softmax(-1)
        found.append(log_probs.gather(-1, wanted.expand(len(some), -1)[..., None])[..., 0].mean(-1))
    return torch.cat(found)


def _patch(row: int, where: slice, states: Tensor) -> Any:
    def put(module: Any, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[row, where] = states.to(hidden.device, hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return put


def _forward(model: Any, ids: Tensor, positions: int) -> Tensor:
    """Logits [B, T or `positions`, V] of the last positions at least."""
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False, **keeping(model, positions)).logits


def depth_score(drop: Tensor, never_knew: Tensor, least: float = LEAST_DROP) -> float | None:
    """UDS of drops [L] per block, given those of a source that never knew; None where no block of it drops enough."""
    counted = never_knew > least
    if not counted.any():
        return None
    weight = never_knew[counted].double()
    return float((weight * (drop[counted].double() / weight).clamp(0, 1)).sum() / weight.sum())
