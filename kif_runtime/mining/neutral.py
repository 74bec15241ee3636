"""The neutral direction: one vector per model and site that makes a name read as an unremarkable entity of its kind.

Replacing a name's state at one token leaves what earlier tokens of the name gave to later ones, and even a whole-state
replacement by the controls' mean leaves four tenths of the excess knowledge on the embedded model. So the target of the
projection is learned, once per model and with no subject in sight: over control entities, the vector v that, set as the
state's component along itself at the name's last tokens, brings the next-token distribution to the *prior*, the mean
distribution of other entities of the kind that have another answer in the same template. It works the way an edit at
the last subject token can insert a fact (ROME, arXiv 2202.05262, §3), turned to removal and shared by all subjects.
Bystanders, entities named in the same text, are trained to keep their own distribution.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .corpus import Corpus, Entity
from .reading import Batch, Edit, Prompt, Reader

TEMPLATES, NAMES = 18, 12  # reference templates and entities of each kind
LEARNED = range(12)  # of the templates, the shortest: what the direction is learned on
HELD_OUT = range(12, TEMPLATES)
BUCKETS = 512
_BYSTANDERS = ("{} and {}. ", "Unlike {}, ", "We talked about {}. ", "{}, ")


@dataclass(frozen=True)
class References:
    """What the untouched model says of control entities: one kind's next-token distributions.

    templates: T of them. tokens [T, K]: each template's likeliest tokens. probs [T, N, K + 1]: their probabilities for
    each of N entities, the rest of the vocabulary in the last bucket. answers [T, N]: the likeliest token.
    """

    templates: tuple[str, ...]
    names: tuple[str, ...]
    tokens: Tensor
    probs: Tensor
    answers: Tensor

    def prior(self, template: int, answer: int, without: Sequence[int] = ()) -> Tensor:
        """Mean distribution [K + 1] of the entities with another answer; of all where fewer than three have one."""
        others = [n for n in range(len(self.names)) if n not in without]
        differ = [n for n in others if int(self.answers[template, n]) != answer]
        return self.probs[template, differ if len(differ) >= 3 else others].mean(0)


def bucketed(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [B, K + 1] of the listed tokens [B, K] and of all others together."""
    listed = log_probs.gather(1, tokens)
    rest = (1 - listed.exp().sum(1, keepdim=True)).clamp_min(1e-9).log()
    return torch.cat([listed, rest], 1)


def divergence(prior: Tensor, log_probs: Tensor) -> Tensor:
    """KL(prior ‖ p) [B] over the buckets, in nats."""
    return (prior * (prior.clamp_min(1e-9).log() - log_probs)).sum(1)


def move(
    vector: Tensor, rows: Tensor, positions: Tensor, kept: Tensor | None = None, target: Tensor | None = None
) -> Edit:
    """The operator as an edit: at (rows, positions) the component along `vector` is set to its length.

    With `kept` [r, D], orthonormal and orthogonal to `vector`, those components are set to `target` [r] too.
    """
    unit = vector / vector.norm()

    def edit(x: Tensor) -> Tensor:
        rows_, positions_ = rows.to(x.device), positions.to(x.device)
        state = x[rows_, positions_].float()
        change = vector - (state @ unit)[:, None] * unit
        if kept is not None and target is not None:
            change = change - (state @ kept.T - target) @ kept
        return x.index_put((rows_, positions_), change.to(x.dtype), accumulate=True)

    return edit


def chosen_templates(corpus: Corpus, kind: str) -> tuple[str, ...]:
    """The kind's shorter templates, whose ends ask for a fact."""
    return tuple(sorted(corpus.templates[kind], key=lambda t: len(t.split()))[:TEMPLATES])


@torch.no_grad()
def references(reader: Reader, corpus: Corpus, kind: str, rng: random.Random) -> References:
    """Ask the untouched model about NAMES entities of `kind`, spread over its groups."""
    templates = chosen_templates(corpus, kind)
    names = [e.name for e in spread([e for e in corpus.entities if e.kind == kind], NAMES, rng)]
    prompts = [Prompt.of(t, n) for t in templates for n in names]
    rows = [reader.next_token(reader.encode([p.text for p in prompts[i : i + 48]])) for i in range(0, len(prompts), 48)]
    log_probs = torch.cat(rows).view(len(templates), len(names), -1)
    tokens = log_probs.exp().mean(1).topk(min(BUCKETS, log_probs.shape[-1] - 1), dim=-1).indices
    flat = tokens[:, None].expand(-1, len(names), -1).reshape(len(prompts), -1)
    probs = bucketed(log_probs.flatten(0, 1), flat).exp().view(len(templates), len(names), -1)
    return References(templates, tuple(names), tokens, probs, log_probs.argmax(-1))


def spread(entities: Sequence[Entity], count: int, rng: random.Random) -> list[Entity]:
    """`count` entities taken in turn from each group."""
    groups: dict[str, list[Entity]] = {}
    for e in entities:
        groups.setdefault(e.group, []).append(e)
    for members in groups.values():
        rng.shuffle(members)
    longest = max(map(len, groups.values()))
    turns = [members[i] for i in range(longest) for members in groups.values() if i < len(members)]
    return turns[:count]


@dataclass(frozen=True)
class Item:
    """A prompt, its listed tokens [K], what should be answered over these and the rest [K + 1], its share of draws."""

    prompt: Prompt
    tokens: Tensor
    goal: Tensor
    weight: float


def learn(
    reader: Reader,
    corpus: Corpus,
    known: dict[str, References],
    site: int,
    *,
    scale: float,
    steps: int = 60,
    batch: int = 24,
    bystanders: int = 6,
    seed: int = 0,
    tick: Callable[[int], None] | None = None,
) -> Tensor:
    """The neutral direction [D] at `site`, fp32, by Adam on KL to the prior. scale: the usual norm of a name."""
    rng = random.Random(seed)
    items = _items(known)
    weights = [item.weight for item in items]
    aside = bystander_items(reader, known, 24 * bystanders, rng)
    start = torch.randn(reader.width, generator=torch.Generator().manual_seed(seed))
    vector = (start / start.norm() * 0.1 * scale).requires_grad_(True)
    rate = 0.022 * scale
    optimiser = torch.optim.Adam([vector], lr=rate, betas=(0.9, 0.95))
    for step in range(steps):
        drawn = rng.choices(items, weights=weights, k=batch) + rng.sample(aside, min(bystanders, len(aside)))
        loss = mean_loss(reader, site, drawn, vector, [rng.choice((1, 1, 2, 99)) for _ in drawn])
        (vector.grad,) = torch.autograd.grad(loss, vector)
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimiser.step()
        if tick:
            tick(1)
    return vector.detach()


def _items(known: dict[str, References]) -> list[Item]:
    """Every (template, entity), weighted by how far the model's answer is from the prior: that is what must go."""
    made = []
    for reference in known.values():
        for t in LEARNED:
            for n, name in enumerate(reference.names):
                prior = reference.prior(t, int(reference.answers[t, n]), without=[n])
                far = divergence(prior[None], reference.probs[t, n : n + 1].clamp_min(1e-9).log())
                made.append(
                    Item(
                        Prompt.of(reference.templates[t], name), reference.tokens[t], prior, min(float(far), 2.0) + 0.05
                    )
                )
    return made


@torch.no_grad()
def bystander_items(
    reader: Reader, known: dict[str, References], count: int, rng: random.Random, templates: Sequence[int] = LEARNED
) -> list[Item]:
    """Texts that name one entity and ask about another, whose answer must stay."""
    names = [n for r in known.values() for n in r.names]
    made = []
    for index in range(count):
        reference = rng.choice(list(known.values()))
        t, n = rng.choice(templates), rng.randrange(len(reference.names))
        aside = rng.choice([x for x in names if x != reference.names[n]])
        lead = _BYSTANDERS[index % len(_BYSTANDERS)].replace("{}", aside, 1).replace("{}", reference.names[n], 1)
        text = lead + reference.templates[t].replace("{}", reference.names[n])
        made.append((Prompt(text, aside, lead.index(aside)), reference.tokens[t]))
    out = []
    for i in range(0, len(made), 32):
        chunk = made[i : i + 32]
        tokens = torch.stack([t for _, t in chunk])
        goals = bucketed(reader.next_token(reader.encode([p.text for p, _ in chunk])), tokens).exp()
        out += [Item(p, t, g, 1.0) for (p, t), g in zip(chunk, goals, strict=True)]
    return out


def mean_loss(reader: Reader, site: int, items: Sequence[Item], vector: Tensor, suffixes: Sequence[int]) -> Tensor:
    """Mean divergence, in nats, from what each item should answer, when the last `suffixes[i]` tokens of its name carry
    `vector` at the site; differentiable in `vector` [D]."""
    batch: Batch = reader.encode([i.prompt.text for i in items])
    spans = [reader.name_span(batch.offsets[r, : int(batch.lengths[r])], i.prompt) for r, i in enumerate(items)]
    places = [(r, p) for r, (span, last) in enumerate(zip(spans, suffixes, strict=True)) for p in span[-last:]]
    rows, positions = (torch.tensor(x) for x in zip(*places, strict=True))
    with torch.enable_grad(), reader.edited(site, move(vector.to(reader.device), rows, positions)):
        tokens = torch.stack([i.tokens for i in items])
        goals = torch.stack([i.goal for i in items])
        return divergence(goals, bucketed(reader.next_token(batch), tokens)).mean()
