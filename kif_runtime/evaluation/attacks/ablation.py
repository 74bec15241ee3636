"""Direction ablation: what an erasure writes into the residual stream to keep the model silent is taken out again.

The direction is the difference of mean states between prompts about the forgotten and about others, in the attacked
model itself. Source: Arditi et al., Refusal is mediated by a single direction (arXiv 2406.11717).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...blocks import decoder_blocks
from ..facts import BARE, Fact, encode
from ..outputs import read
from .outcome import Outcome, ask, asked_outcome
from .weights import edited

DEPTHS = (0.25, 0.5, 0.75)


def ablate_directions(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    others: Sequence[Fact],
    depths: Sequence[float] = DEPTHS,
    form: str = BARE,
) -> Outcome:
    """For a block at each of `depths`, its direction is projected out after every block, and the facts are asked; a hit
    is a fact that any of them brings out, its probability the highest. others: facts about other subjects."""
    own = _states(model, encode(tokenizer, facts, form=form))
    away = _states(model, encode(tokenizer, others, form=form))
    blocks = sorted({min(len(own) - 1, int(depth * len(own))) for depth in depths})
    tries = []
    for block in blocks:
        direction = torch.nn.functional.normalize(own[block] - away[block], dim=0)
        everywhere = {site: _without(direction) for site in range(len(decoder_blocks(model)))}
        with edited(model, everywhere):
            tries.append(ask(model, tokenizer, facts, form=form))
    best = [max(asked, key=lambda one: (one.rank == 1, one.probability)) for asked in zip(*tries, strict=True)]
    return asked_outcome("direction ablation", {"directions": len(blocks)}, facts, best)


def _states(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """[L, D]: the mean over prompts of each block's output at the last token."""
    return torch.stack([one.blocks for one in read(model, [tuple(p) for p in prompts])]).mean(0)


def _without(direction: Tensor) -> Any:
    def edit(hidden: Tensor) -> Tensor:
        d = direction.to(hidden.device, hidden.dtype)
        return hidden - (hidden @ d)[..., None] * d

    return edit
