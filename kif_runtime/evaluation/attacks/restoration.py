"""Restoration: what an erasure took out of the stream is put back, and the rest of the model is asked again.

If the answer returns, the model still held it and had only lost its cue: suppression, not deletion. What is put back
comes from the untouched model on the same prompt: the part of its state that lies in the removed directions, or the
activations of the few sparse features that tell the subject. Source: arXiv 2602.18505.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import KifError
from ..facts import Fact, first_token, last_logits, padded
from .outcome import Asked, Outcome, asked_outcome, judged
from .sae import SparseAutoencoder
from .weights import edited, site_states

BATCH = 16
States = Mapping[int, Tensor]  # site → [T, D]
Put = Callable[[Tensor, Tensor], Tensor]  # (erased states, untouched states) → states with something put back


def prompt_states(model: Any, tokenizer: Any, facts: Sequence[Fact], sites: Sequence[int]) -> list[States]:
    """Per fact, the states of its bare prompt at `sites`."""
    found: list[States] = []
    for start in range(0, len(facts), BATCH):
        prompts = [tokenizer(fact.prompt)["input_ids"] for fact in facts[start : start + BATCH]]
        ids, mask = padded(prompts)
        states = site_states(model, ids, mask, list(sites))
        for row, prompt in enumerate(prompts):
            found.append({site: states[site][row, : len(prompt)].cpu() for site in sites})
    return found


def removed_directions(capsules: Sequence[Any]) -> dict[int, Tensor]:
    """Site → orthonormal basis [r, D] of all directions that `capsules` take out there."""
    rows: dict[int, list[Tensor]] = {}
    for capsule in capsules:
        for signature in capsule.signatures:
            rows.setdefault(signature.site, []).append(signature.basis.float())
    return {site: torch.linalg.qr(torch.cat(some).T).Q.T.contiguous() for site, some in rows.items()}


def restore_directions(
    model: Any, tokenizer: Any, facts: Sequence[Fact], *, untouched: Sequence[States], bases: Mapping[int, Tensor]
) -> Outcome:
    """From the name on, the part of each state in the span of bases[site] [r, D] becomes the untouched model's."""
    if not bases:
        raise KifError("there are no removed directions to put back; give the capsules that the erasure was made from")
    puts = {site: _within(basis) for site, basis in bases.items()}
    asked = _asked(model, tokenizer, facts, untouched, puts)
    budget = {"directions": sum(len(basis) for basis in bases.values()), "sites": len(bases)}
    return asked_outcome("removed directions put back", budget, facts, asked)


def restore_features(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    untouched: Sequence[States],
    site: int,
    sae: SparseAutoencoder,
    features: Sequence[int],
) -> Outcome:
    """From the name on, the activations of `features` at one site become the untouched model's."""
    asked = _asked(model, tokenizer, facts, untouched, {site: _features(sae, list(features))})
    return asked_outcome("sparse features put back", {"features": len(features), "sites": 1}, facts, asked)


def telling_features(sae: SparseAutoencoder, own: Tensor, others: Tensor, count: int = 16) -> list[int]:
    """The features whose mean activation on the subject's states [N, D] is furthest over that on others' [M, D]."""
    difference = sae.features(own).mean(0) - sae.features(others).mean(0)
    return difference.topk(min(count, len(difference))).indices.tolist()


def name_start(tokenizer: Any, fact: Fact) -> int:
    """The index of the first token of the bare prompt that holds a letter of the name; 0 where it is not found."""
    at = fact.prompt.find(fact.subject)
    if at <= 0 or not getattr(tokenizer, "is_fast", False):
        return 0
    offsets = tokenizer(fact.prompt, return_offsets_mapping=True)["offset_mapping"]
    return next((i for i, (_, end) in enumerate(offsets) if end > at), 0)


def _within(basis: Tensor) -> Put:
    def put(erased: Tensor, own: Tensor) -> Tensor:
        u = basis.to(erased.device, torch.float32)
        missing = (own.float() - erased.float()) @ u.T
        return (erased.float() + missing @ u).to(erased.dtype)

    return put


def _features(sae: SparseAutoencoder, chosen: list[int]) -> Put:
    def put(erased: Tensor, own: Tensor) -> Tensor:
        missing = sae.features(own.cpu()) - sae.features(erased.cpu())
        kept = torch.zeros_like(missing)
        kept[..., chosen] = missing[..., chosen]
        return (erased.float() + sae.written(kept).to(erased.device)).to(erased.dtype)

    return put


@torch.inference_mode()
def _asked(
    model: Any, tokenizer: Any, facts: Sequence[Fact], untouched: Sequence[States], puts: Mapping[int, Put]
) -> list[Asked]:
    """One prompt at a time: each has its own states to put in."""
    found = []
    for fact, states in zip(facts, untouched, strict=True):
        prompt, start = tokenizer(fact.prompt)["input_ids"], name_start(tokenizer, fact)
        edits = {site: _from(start, put, states[site]) for site, put in puts.items()}
        with edited(model, edits):
            logits = last_logits(model, [prompt])
        found += judged(logits, [first_token(tokenizer, fact.answer)])
    return found


def _from(start: int, put: Put, own: Tensor) -> Callable[[Tensor], Tensor]:
    def edit(hidden: Tensor) -> Tensor:
        changed = hidden.clone()
        changed[:, start:] = put(hidden[:, start:], own[None, start:].to(hidden.device))
        return changed

    return edit
