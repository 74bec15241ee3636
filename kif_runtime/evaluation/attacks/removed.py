"""Restoration as the suite tries it: what the untouched model has and the erased one lacks, found and put back.

Called with facts and no state on, each gives the attack, which holds the untouched model's states for these facts.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...blocks import decoder_blocks
from ...errors import KifError
from ..audit import Audit
from ..facts import Fact
from ..states import State
from ..text import sample_text, window_batches
from .outcome import Outcome
from .restoration import (
    States,
    name_start,
    prompt_states,
    removed_directions,
    restore_directions,
    restore_features,
    telling_features,
)
from .sae import SparseAutoencoder, train_sae
from .weights import site_states

RANK = 4  # where no capsule tells what was removed
DEPTHS = (0.1, 0.25)
SAE_DEPTH = 0.1
SAE_TOKENS = 8192

Try = Callable[[Any, Any, Sequence[Fact]], Outcome]  # (model, tokenizer, facts)


class Directions:
    """The removed directions, from the capsules, or else the RANK leading directions, at DEPTHS, in which the erased
    model's states differ from the untouched model's from the name on."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._bases: dict[int, Tensor] = removed_directions(audit.after.capsules)

    def __call__(self, facts: Sequence[Fact]) -> Try:
        self._bases = self._bases or self._found(facts)
        own = states_of(self._audit, self._audit.before, facts, list(self._bases))
        return functools.partial(restore_directions, untouched=own, bases=self._bases)

    def _found(self, facts: Sequence[Fact]) -> dict[int, Tensor]:
        audit = self._audit
        sites = sites_at(audit, DEPTHS)
        before, after = (states_of(audit, state, facts, sites) for state in (audit.before, audit.after))
        starts = [name_start(audit.tokenizer, fact) for fact in facts]
        bases = {}
        for site in sites:
            apart = [a[site][s:] - b[site][s:] for a, b, s in zip(before, after, starts, strict=True)]
            rows = torch.nn.functional.normalize(torch.cat(apart).float(), dim=1)  # each token's word counts the same
            bases[site] = torch.linalg.svd(rows, full_matrices=False).Vh[:RANK]
        return bases


class Features:
    """Sparse features of the untouched model that tell the subject, by an autoencoder trained on the spot on states of
    the running text and of the questions, at one early site."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._trained: tuple[SparseAutoencoder, Tensor] | None = None

    def __call__(self, facts: Sequence[Fact]) -> Try:
        audit = self._audit
        (site,) = sites_at(audit, (SAE_DEPTH,))
        self._trained = self._trained or self._train(site)
        sae, away = self._trained
        own = states_of(audit, audit.before, facts, [site])
        named = [one[site][max(1, name_start(audit.tokenizer, fact)) :] for one, fact in zip(own, facts, strict=True)]
        telling = telling_features(sae, torch.cat(named), away)
        return functools.partial(restore_features, untouched=own, site=site, sae=sae, features=telling)

    def _train(self, site: int) -> tuple[SparseAutoencoder, Tensor]:
        """The autoencoder, and states of others for it to tell apart."""
        audit = self._audit
        if not audit.others or not audit.text:
            raise KifError("sparse features need facts about others and running text; give --neighbours and --text")
        asked = [*audit.facts, *audit.others[:64]]
        states = [one[site][1:] for one in states_of(audit, audit.before, asked, [site])]  # the first token is a sink
        data = torch.cat([self._text(site, audit.text), *states])
        steps = audit.pick(quick=100, full=300)
        sae = train_sae(data, features=2 * data.shape[1], steps=steps, seed=audit.seed)
        return sae, torch.cat(states[len(audit.facts) :])

    def _text(self, site: int, text: str) -> Tensor:
        """[N, D] fp32: states of the running text."""
        ids = sample_text(self._audit.tokenizer, text, window=128, tokens=SAE_TOKENS).ids
        with self._audit.running(self._audit.before) as on:
            found = [site_states(on.model, some, torch.ones_like(some), [site])[site] for some in window_batches(ids)]
        return torch.cat(found)[:, 1:].flatten(0, 1).float().cpu()


def states_of(audit: Audit, state: State, facts: Sequence[Fact], sites: Sequence[int]) -> list[States]:
    with audit.running(state) as on:
        return prompt_states(on.model, audit.tokenizer, facts, sites)


def sites_at(audit: Audit, depths: Sequence[float]) -> list[int]:
    with audit.running(audit.before) as on:
        count = len(decoder_blocks(on.model))
    return sorted({int(depth * count) for depth in depths})
