"""Looking inside: the answer is among a few candidates that some block's state, or its change, points to.

Head projection takes the tokens that the logit lens finds most and least likely at each block; probability delta those
whose probability rises and falls most from block to block. Source: Patil et al., Can sensitive information be deleted
from LLMs? (arXiv 2309.17410).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError
from ..facts import BARE, Fact, encode, first_token
from ..latent import Lens
from ..outputs import Reading, read
from .outcome import Outcome, subjects_of

K = 4


def head_projection(model: Any, tokenizer: Any, facts: Sequence[Fact], *, k: int = K, form: str = BARE) -> Outcome:
    """A hit is an answer whose first token is one of the k most or k least likely at any block's last token."""
    lenses = _lenses(model, tokenizer, facts, form)
    return _outcome("head projection", tokenizer, facts, lenses, k)


def probability_delta(model: Any, tokenizer: Any, facts: Sequence[Fact], *, k: int = K, form: str = BARE) -> Outcome:
    """A hit is an answer whose first token is one of the k that rise or the k that fall most between two blocks."""
    deltas = [lens.diff(dim=0) for lens in _lenses(model, tokenizer, facts, form)]
    return _outcome("probability delta", tokenizer, facts, deltas, k)


def candidates(values: Tensor, k: int) -> set[int]:
    """The tokens with the k largest and the k smallest of values [L, V], in any row."""
    top, bottom = values.topk(k, -1).indices, values.topk(k, -1, largest=False).indices
    return set(torch.cat([top, bottom], -1).flatten().tolist())


def _lenses(model: Any, tokenizer: Any, facts: Sequence[Fact], form: str) -> list[Tensor]:
    """Per fact, [L, V] probabilities. Raises ModelError where the logit lens does not apply to this model."""
    lens = Lens(model)
    readings: list[Reading] = read(model, [tuple(prompt) for prompt in encode(tokenizer, facts, form=form)])
    final = torch.stack([lens.log_probs(one.blocks[-1]) for one in readings])
    if not lens.fits_to(final, torch.stack([one.log_probs for one in readings])):
        raise ModelError(
            "this model goes from its last block to its logits in another way; the lens says nothing of it"
        )
    return [lens.log_probs(one.blocks).exp() for one in readings]


def _outcome(name: str, tokenizer: Any, facts: Sequence[Fact], values: Sequence[Tensor], k: int) -> Outcome:
    hits = tuple(
        first_token(tokenizer, fact.answer) in candidates(rows, k) for fact, rows in zip(facts, values, strict=True)
    )
    return Outcome(name, {"candidates": 2 * k * len(values[0])}, hits, subjects_of(facts))
