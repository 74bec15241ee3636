"""Choosing a model's site: candidates are validated on templates and entities held out, for erasure against harm.

A neutral direction is learned at each candidate as `prepare` would, and set at names of other entities, in other
templates. What then is left of the distance to the prior, and what bystanders named in the same text lose, are in the
same unit; the site with the least of both together is the best, among those where a name can be told from others.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MiningError
from . import neutral
from .control import Progress
from .corpus import ANY, Corpus, Entity, corpus
from .detector import fisher, gram
from .neutral import Item, References, bucketed, divergence
from .reading import Prompt, Reader, normalised, undisturbed

STEPS = 60
HEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6)  # of the way up
ENTITIES = 6  # of each kind that are asked about
BYSTANDERS = 120
FAR = 0.15  # nats: nearer to the prior there is nothing to erase
KNOWN = 24  # entities for which a detector is made
ENOUGH_RECALL = 0.97
_BATCH = 24


@dataclass(frozen=True)
class SiteScore:
    """One candidate, each figure on what was held out.

    before, left: mean KL(prior ‖ p) in nats, of the untouched model and with the neutral direction at the name's last
    token. harm: mean KL(untouched ‖ p) where a bystander's name carries it. recall: share of mentions that a detector
    recognises whose threshold is over every token of the texts about others.
    """

    site: int
    before: float
    left: float
    harm: float
    recall: float

    @property
    def kept(self) -> float:
        return self.left / max(self.before, 1e-9)

    @property
    def loss(self) -> float:
        return self.left + self.harm


def candidate_sites(blocks: int) -> tuple[int, ...]:
    return tuple(sorted({round(height * blocks) for height in HEIGHTS}))


def best_site(scores: Sequence[SiteScore]) -> SiteScore:
    """The least loss among those with enough recall; where none has enough, the one that recalls most."""
    telling = [s for s in scores if s.recall >= ENOUGH_RECALL]
    return min(telling, key=lambda s: s.loss) if telling else max(scores, key=lambda s: (s.recall, -s.loss))


def validate_sites(
    model: nn.Module, tokenizer: Any, sites: Sequence[int] | None = None, *, steps: int = STEPS, seed: int = 0,
    progress: Progress | None = None,
) -> list[SiteScore]:  # fmt: skip
    """Score each of `sites`, by default `candidate_sites`; each costs `steps` gradient steps.

    The model is left as it was. Raises MiningError for a site that is no block, ModelError for a model without blocks.
    """
    reader = Reader(model, tokenizer)
    chosen = tuple(dict.fromkeys(sites if sites is not None else candidate_sites(len(reader.blocks))))
    for site in chosen:
        if not 0 <= site < len(reader.blocks):
            raise MiningError(f"site {site} is not a block of this model; choose 0 to {len(reader.blocks) - 1}")
    if steps < 1:
        raise MiningError(f"{steps} steps are not possible; ask for 1 or more")
    tell, total = progress or (lambda done, total, what: None), len(chosen) * steps
    with undisturbed(model):
        held = _read(reader, corpus(), random.Random(seed), tell)
        done = itertools.count(1)
        return [
            _score(reader, held, site, steps, seed, lambda _: tell(next(done), total, "validating sites"))
            for site in chosen
        ]


@dataclass(frozen=True)
class _Held:
    """What is read once: what directions are learned on, and what is held out from that."""

    known: dict[str, References]
    asked: list[Item]
    aside: list[Item]
    before: float
    mentions: list[list[Prompt]]
    others: list[Prompt]


def _read(reader: Reader, data: Corpus, rng: random.Random, tell: Progress) -> _Held:
    known: dict[str, References] = {}
    for kind in data.kinds:
        tell(len(known), len(data.kinds), "reading reference answers")
        known[kind] = neutral.references(reader, data, kind, rng)
    asked: list[Item] = []
    before: list[Tensor] = []
    for kind, about in known.items():
        names = [e for e in data.entities if e.kind == kind and e.name not in about.names]
        items, far = _ask(reader, about, neutral.spread(names, ENTITIES, rng))
        asked += [item for item, nats in zip(items, far.tolist(), strict=True) if nats > FAR]
        before.append(far[far > FAR])
    if not asked:
        raise MiningError("the model answers alike whichever name is in the prompt; no site can be told from another")
    tell(len(known), len(data.kinds), "reading reference answers")
    aside = neutral.bystander_items(reader, known, BYSTANDERS, rng, templates=neutral.HELD_OUT)
    subjects = rng.sample(data.entities, KNOWN)
    return _Held(known, asked, aside, float(torch.cat(before).mean()), *_mentions(data, subjects))


def _ask(reader: Reader, about: References, entities: Sequence[Entity]) -> tuple[list[Item], Tensor]:
    """Templates held out, asked about `entities`: what each should answer, and KL(prior ‖ untouched) [N]."""
    pairs = [(t, Prompt.of(about.templates[t], e.name)) for e in entities for t in neutral.HELD_OUT]
    rows = [reader.next_token(reader.encode([p.text for _, p in pairs[i : i + 48]])) for i in range(0, len(pairs), 48)]
    log_probs = torch.cat(rows)
    items = [
        Item(prompt, about.tokens[t], about.prior(t, int(answer)), 1.0)
        for (t, prompt), answer in zip(pairs, log_probs.argmax(-1), strict=True)
    ]
    own = bucketed(log_probs, torch.stack([item.tokens for item in items]))
    return items, divergence(torch.stack([item.goal for item in items]), own)


def _mentions(data: Corpus, subjects: Sequence[Entity]) -> tuple[list[list[Prompt]], list[Prompt]]:
    """Prompts about each of `subjects`, the name never first, and one about every other entity."""
    templates = [t for t in data.templates[ANY] if not t.startswith("{}")]
    chosen = {e.name for e in subjects}
    others = [e.name for e in data.entities if e.name not in chosen]
    told = [[Prompt.of(t, e.name) for t in templates] for e in subjects]
    return told, [Prompt.of(templates[i % len(templates)], name) for i, name in enumerate(others)]


def _score(reader: Reader, held: _Held, site: int, steps: int, seed: int, tick: Callable[[int], None]) -> SiteScore:
    states, negatives = _names(reader, held, site)
    scale = float(torch.cat(states).norm(dim=1).median())
    vector = neutral.learn(reader, corpus(), held.known, site, scale=scale, steps=steps, seed=seed, tick=tick)
    left, harm = (_mean_loss(reader, site, items, vector) for items in (held.asked, held.aside))
    return SiteScore(site, held.before, left, harm, _recall(states, negatives))


def _mean_loss(reader: Reader, site: int, items: list[Item], vector: Tensor) -> float:
    total = 0.0
    for start in range(0, len(items), _BATCH):
        some = items[start : start + _BATCH]
        total += float(neutral.mean_loss(reader, site, some, vector, [1] * len(some))) * len(some)
    return total / len(items)


def _names(reader: Reader, held: _Held, site: int) -> tuple[list[Tensor], Tensor]:
    """For each subject its last name tokens [P, D]; every token of the texts about others, RMS-normalised [N, D]."""
    flat = [p for prompts in held.mentions for p in prompts]
    rows = reader.states([p.text for p in flat], site)
    last = [x[span[-1]] for x, span in zip(rows, reader.name_tokens(flat), strict=True)]
    count = len(held.mentions[0])
    told = [torch.stack(last[i : i + count]) for i in range(0, len(last), count)]
    return told, normalised(torch.cat(reader.states([p.text for p in held.others], site)))


def _recall(subjects: list[Tensor], negatives: Tensor) -> float:
    """Every third mention is held out; the threshold is over all negatives."""
    mean = negatives.mean(0)
    scatter = gram(negatives, mean) / len(negatives)
    hits = []
    for raw in subjects:
        states, out = normalised(raw), torch.arange(len(raw)) % 3 == 2
        detector = fisher(states[~out], mean, scatter, negatives[:0], negatives)
        hits.append((detector.scores(states[out]) > detector.scores(negatives).max()).float().mean())
    return float(torch.stack(hits).mean())
