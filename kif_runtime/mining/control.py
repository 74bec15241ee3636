"""What mining needs to know of a model, read once and cached: control states, reference answers, neutral direction."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from safetensors import safe_open
from torch import Tensor

from . import neutral as neutral_
from .corpus import ANY, DATA, Corpus, Entity, corpus, mentions
from .kinds import Kinds, learn_kinds
from .reading import Prompt, Reader, normalised
from .repeated import repeated

Progress = Callable[[int, int, str], None]
# Later blocks make the first token an attention sink with massive activations, in which a name can no longer be seen.
OPENING_SITE = 0
RECIPE = 9  # raise it when what is cached changes meaning

_TWICE = 4  # every so many entities are read in a text that names them twice, too

# The embedded model's neutral direction ships, since learning it well takes long; `bench/neutral.py` makes it anew.
SHIPPED = DATA / "neutral.safetensors"


@dataclass(frozen=True)
class Level:
    """Control states at one more site, of every second text.

    states [N, D] fp16: RMS-normalised. text [N]: which text each is of. mean [D], scatter [D, D]: of the states. usual
    [D]: the mean state, not normalised, of the tokens that are moved there.
    """

    site: int
    states: Tensor
    text: Tensor
    mean: Tensor
    scatter: Tensor
    usual: Tensor


@dataclass(frozen=True)
class Control:
    """One model's controls at one site.

    states [N, D] fp16: RMS-normalised states of every token of the control texts. text [N]: which text each is of.
    last [N]: it is the last token of its entity's name. entity [texts]: the number of that entity, or −1. mean [D],
    scatter [D, D]: of the states. raw_mean [D]: of last tokens, not normalised. neutral [D]. opening: OPENING_SITE, for
    first tokens. early: early_site, for later tokens of names; None where the site is 0. kinds: to tell a name's kind.
    known: reference answers by kind.
    """

    site: int
    fingerprint: str
    texts: tuple[str, ...]
    states: Tensor
    text: Tensor
    last: Tensor
    entity: Tensor
    mean: Tensor
    scatter: Tensor
    raw_mean: Tensor
    neutral: Tensor
    opening: Level
    early: Level | None
    kinds: Kinds
    known: dict[str, neutral_.References]
    entities: tuple[Entity, ...]

    def silent(self, text: Tensor, forms: Sequence[str]) -> Tensor:
        """Which rows of `text` are of a text that does not name the subject: those are its negatives."""
        return _silent(self.texts, tuple(forms))[text]


@lru_cache(maxsize=4)
def _silent(texts: tuple[str, ...], forms: tuple[str, ...]) -> Tensor:
    """Every detector of a subject asks this of the same thousands of texts."""
    return ~torch.tensor([mentions(t, forms) for t in texts])


def default_site(blocks: int) -> int:
    """A tenth of the way up: the name's tokens have met, and what is known of them is not yet spread."""
    return max(1, round(0.1 * blocks))


def early_site(site: int) -> int:
    """Half way to the site: a token knows those before it, and nobody has yet read what is known of it."""
    return site // 2


def usual_sites(blocks: int) -> tuple[int, ...]:
    """Where the signatures of a capsule lie that was mined with the default site."""
    site = default_site(blocks)
    return tuple(sorted({OPENING_SITE, early_site(site), site}))


def read_control(reader: Reader, site: int, digest: str, steps: int, progress: Progress) -> Control:
    """Read all of it. steps: for the neutral direction, where none ships."""
    data = corpus()
    rng = random.Random(0)
    prompts, about = _control_prompts(data, repeated(reader.tokenizer), rng)
    texts = tuple(p.text for p in prompts) + data.passages
    shipped = shipped_neutral(digest, site)
    total = len(texts) + len(data.entities) // 2 + 100 * len(data.kinds) + (0 if shipped is not None else 50 * steps)
    done = 0

    def advance(count: int, what: str) -> None:
        nonlocal done
        done += count
        progress(done, total, what)

    raw = reader.states(texts, site, tick=lambda n: advance(n, "reading controls"))
    spans = reader.name_tokens(prompts)
    last = torch.cat([_marked(len(x), spans[i][-1] if i < len(spans) else None) for i, x in enumerate(raw)])
    text = torch.cat([torch.full((len(x),), i) for i, x in enumerate(raw)])
    stacked = torch.cat(raw)
    states = normalised(stacked)
    mean = states.mean(0)
    kinds = learn_kinds(reader, data, tick=lambda n: advance(n, "telling kinds apart"))
    known = {}
    for kind in data.kinds:
        known[kind] = neutral_.references(reader, data, kind, rng)
        advance(100, "reading reference answers")
    lead = reader.leading_tokens
    opening = _level(reader, texts, OPENING_SITE, [[(i, lead)] for i in range(len(prompts))])
    later = [[(i, q) for q in span[1:]] for i, span in enumerate(spans)]
    early = _level(reader, texts, early_site(site), later) if site > 0 else None
    raw_last = stacked[last]
    vector = shipped
    if vector is None:
        vector = neutral_.learn(
            reader, data, known, site, scale=float(raw_last.norm(dim=1).median()), steps=steps,
            tick=lambda n: advance(50 * n, "learning the neutral direction"),
        )  # fmt: skip
    return Control(
        site, digest, texts, states.half(), text, last, torch.tensor([*about, *([-1] * len(data.passages))]),
        mean, (states - mean).T @ (states - mean) / len(states), raw_last.mean(0), vector,
        opening, early, kinds, known, data.entities,
    )  # fmt: skip


def _level(reader: Reader, texts: Sequence[str], site: int, wanted: Sequence[Sequence[tuple[int, int]]]) -> Level:
    """Every second text at `site`; `usual` is the mean over the `wanted` (text, position) of these texts."""
    chosen = range(0, len(texts), 2)
    rows = dict(zip(chosen, reader.states([texts[i] for i in chosen], site), strict=True))
    states = normalised(torch.cat(list(rows.values())))
    text = torch.cat([torch.full((len(x),), i) for i, x in rows.items()])
    usual = torch.stack([rows[i][q] for places in wanted for i, q in places if i in rows]).mean(0)
    away = states - states.mean(0)
    return Level(site, states.half(), text, states.mean(0), away.T @ away / len(states), usual)


def _control_prompts(data: Corpus, twice: Sequence[str], rng: random.Random) -> tuple[list[Prompt], list[int]]:
    """About every entity a template for anything and one for its kind; about some, a text that names it twice."""
    prompts, about = [], []
    for number, entity in enumerate(data.entities):
        for templates in (data.templates[ANY], data.templates[entity.kind]):
            prompts.append(Prompt.of(rng.choice(templates), entity.name))
            about.append(number)
        if number % _TWICE == 0:
            prompts.append(Prompt.of(twice[number // _TWICE % len(twice)], entity.name, mention=1))
            about.append(number)
    return prompts, about


def _marked(length: int, position: int | None) -> Tensor:
    row = torch.zeros(length, dtype=torch.bool)
    if position is not None:
        row[position] = True
    return row


def shipped_neutral(digest: str, site: int) -> Tensor | None:
    """The neutral direction [D] that ships for the model with this fingerprint, or None."""
    if not SHIPPED.exists():
        return None
    with safe_open(SHIPPED, "pt") as file:
        name = f"{digest}.{site}"
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 - not a mapping
