"""Learn a model's neutral direction with many steps and put it where mining finds it, keyed by the model's fingerprint.

`python bench/neutral.py [--model MODEL] [--site L] [--steps N] [--wide N] [--out FILE]`. The first stage is what any
model gets on first use, with more steps. The second goes over all control entities, not only those whose answers make
the priors, and fits beside the vector a linear map of the entity's own state, which is left out afterwards: so the
vector need not bend to what only some entities ask for. The vector that ships for the embedded model was made in these
two stages, 150 and 300 steps, by development scripts from which this one was put together, on one thread of a shared
machine (16 and 24 minutes); that this script gives the same vector bit for bit was not checked.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from kif_runtime import load_model
from kif_runtime.fingerprint import fingerprint
from kif_runtime.mining import neutral
from kif_runtime.mining.control import SHIPPED, default_site
from kif_runtime.mining.corpus import corpus
from kif_runtime.mining.neutral import References, bucketed, divergence, move
from kif_runtime.mining.reading import Prompt, Reader, normalised

QUESTIONS = 5  # templates asked about each entity
FAR = 0.15  # nats: nearer to the prior there is nothing to learn
RANK = 32  # of the linear map
BATCH, ASIDE = 24, 4
RATE, MAP_RATE = 0.009, 0.003  # per coordinate and step, of the usual norm


@dataclass(frozen=True)
class Asked:
    """A template asked about an entity; last, early [D]: states of its last name token and mean of those before."""

    entity: int
    prompt: Prompt
    place: int
    tokens: Tensor
    prior: Tensor
    far: float
    last: Tensor
    early: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--site", type=int)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--wide", type=int, default=300, help="steps of the second stage")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    model.requires_grad_(False)
    reader, data, rng = Reader(model, tokenizer), corpus(), random.Random(0)
    site = default_site(len(reader.blocks)) if args.site is None else args.site
    with Progress() as bar:
        task = bar.add_task("learning", total=len(data.kinds) + args.steps + 100 + args.wide)
        known = {}
        for kind in data.kinds:
            known[kind] = neutral.references(reader, data, kind, rng)
            bar.advance(task)
        asked = ask(reader, known, site)
        bar.advance(task, 100)
        scale = float(torch.stack([a.last for a in asked]).norm(dim=1).median())
        advance = {"tick": lambda n: bar.advance(task, n)}
        vector = neutral.learn(reader, data, known, site, scale=scale, steps=args.steps, **advance)
        vector = widen(reader, known, site, asked, vector, scale, args.wide, **advance)
    there = load_file(args.out) if args.out.exists() else {}
    save_file(there | {f"{fingerprint(model)}.{site}": vector.contiguous()}, args.out)


@torch.no_grad()
def ask(reader: Reader, known: dict[str, References], site: int) -> list[Asked]:
    """QUESTIONS of its kind's templates about every entity, with the untouched model's distance from the prior."""
    entities, rng = corpus().entities, random.Random(11)
    chosen = [(i, e, t) for i, e in enumerate(entities) for t in rng.sample(range(neutral.TEMPLATES), QUESTIONS)]
    chosen.sort(key=lambda c: len(known[c[1].kind].templates[c[2]]) + len(c[1].name))
    found = []
    for begin in range(0, len(chosen), 48):
        some = chosen[begin : begin + 48]
        prompts = [Prompt.of(known[e.kind].templates[t], e.name) for _, e, t in some]
        batch = reader.encode([p.text for p in prompts])
        states: list[Tensor] = []
        with reader.edited(site, lambda x, states=states: states.append(x.cpu()) or x):
            log_probs = reader.next_token(batch)
        for row, ((i, e, t), prompt) in enumerate(zip(some, prompts, strict=True)):
            about, span = known[e.kind], reader.name_span(batch.offsets[row, : int(batch.lengths[row])], prompt)
            same = [n for n, name in enumerate(about.names) if name == e.name]
            prior = about.prior(t, int(log_probs[row].argmax()), same)
            far = divergence(prior[None], bucketed(log_probs[row : row + 1], about.tokens[t][None]))
            before = [q for q in span[:-1] if q > reader.leading_tokens]
            early = states[0][row, before].mean(0) if before else torch.zeros(reader.width)
            last = states[0][row, span[-1]].clone()
            found.append(Asked(i, prompt, span[-1], about.tokens[t], prior, float(far), last, early))
    return found


def entity_means(asked: list[Asked]) -> Tensor:
    """[entities, 2, D]: each entity's mean states, of its last name token and of those before."""
    number = torch.tensor([a.entity for a in asked])
    totals = torch.zeros(int(number.max()) + 1, 2, len(asked[0].last))
    totals.index_add_(0, number, torch.stack([torch.stack([a.last, a.early]) for a in asked]))
    return totals / number.bincount()[:, None, None]


def features(means: Tensor) -> Tensor:
    """[entities, RANK]: the leading principal components of the entities' states, whitened."""
    rows = (normalised(means) * (means.norm(dim=-1, keepdim=True) > 0)).flatten(1)
    left, _, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return left[:, :RANK] * len(rows) ** 0.5


def widen(
    reader: Reader, known: dict[str, References], site: int, asked: list[Asked], start: Tensor, scale: float,
    steps: int, tick: Any,
) -> Tensor:  # fmt: skip
    """The vector [D] after Adam on KL to the prior over all that was asked, bystanders keeping their own answers."""
    rng = random.Random(1)
    means = entity_means(asked)
    coordinates, usual = features(means), means[:, 0].mean(0)
    asked = [a for a in asked if a.far > FAR]
    weights = [min(a.far, 2.0) + 0.05 for a in asked]
    aside = neutral.bystander_items(reader, known, 120, random.Random(3))
    vector, matrix = start.clone().requires_grad_(True), torch.zeros(reader.width, RANK, requires_grad=True)
    rates = (RATE * scale, MAP_RATE * scale)
    optimiser = torch.optim.Adam(
        [{"params": [p], "lr": r} for p, r in zip((vector, matrix), rates, strict=True)], betas=(0.9, 0.97)
    )
    for step in range(steps):
        drawn = rng.choices(asked, weights=weights, k=BATCH)
        entities = [a.entity for a in drawn]
        own = vector + coordinates[entities] @ matrix.T
        loss = _loss(reader, site, drawn, own, means[entities, 0] - usual, usual) * BATCH
        loss = loss + neutral.mean_loss(reader, site, rng.sample(aside, ASIDE), vector, [1] * ASIDE) * ASIDE
        vector.grad, matrix.grad = torch.autograd.grad(loss / (BATCH + ASIDE), (vector, matrix))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        optimiser.step()
        tick(1)
    return vector.detach()


def _loss(reader: Reader, site: int, asked: list[Asked], vectors: Tensor, gaps: Tensor, usual: Tensor) -> Tensor:
    """Mean KL(prior ‖ p), each prompt under its own vector [B, D]; its difference `gaps` [B, D] from `usual` gone."""
    units = vectors / vectors.norm(dim=1, keepdim=True)
    rows = (gaps - (gaps * units).sum(1, keepdim=True) * units).detach()
    rows = rows / rows.norm(dim=1, keepdim=True)

    def edit(x: Tensor) -> Tensor:
        for number, (one, vector, row) in enumerate(zip(asked, vectors, rows[:, None], strict=True)):
            x = move(vector, torch.tensor([number]), torch.tensor([one.place]), row, row @ usual)(x)
        return x

    batch = reader.encode([a.prompt.text for a in asked])
    with torch.enable_grad(), reader.edited(site, edit):
        log_probs = bucketed(reader.next_token(batch), torch.stack([a.tokens for a in asked]))
    return divergence(torch.stack([a.prior for a in asked]), log_probs).mean()


if __name__ == "__main__":
    main()
