"""Negatives beyond the control texts: tokens of the vocabulary in strange places, and running text.

Control texts hold few of a model's tokens, and a token that no detector has met may score anything. So each is met
once, in a passage, in the place of another. Running text goes further, with names in it that nobody has heard of: what
ships was written by a model. Thresholds that hold on one kind of text may not on another, and the best to set them on
is what the model will be asked: text of the user's own.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .control import Control, Level, Progress
from .reading import Reader, normalised

# Of a larger vocabulary so many tokens are taken at random.
MOST_TOKENS = 24_000
_ROW, _BETWEEN = 96, 3  # tokens of a row, and from one strange token to the next
LONGEST_ROW = 128


@dataclass(frozen=True)
class Rows:
    """ids: token ids of texts. places: whose states count. texts: what they say, to see whether they name a subject."""

    ids: tuple[tuple[int, ...], ...]
    places: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(self.ids + other.ids, self.places + other.places, self.texts + other.texts)


def strange_rows(tokenizer: Any, passages: Sequence[str]) -> Rows:
    """Pieces of `passages` in which every _BETWEENth token is another of the vocabulary, each of them once."""
    rng = random.Random(0)
    lead = tokenizer("", add_special_tokens=True)["input_ids"]
    inside = list(chain.from_iterable(tokenizer(p, add_special_tokens=False)["input_ids"] for p in passages))
    special = set(tokenizer.all_special_ids)
    vocabulary = [token for token in range(len(tokenizer)) if token not in special]
    rng.shuffle(vocabulary)
    size = min(_ROW, len(inside))
    ids, places, texts = [], [], []
    for some in _pieces(vocabulary[:MOST_TOKENS], max(1, size // _BETWEEN)):
        start = rng.randrange(len(inside) - size + 1)
        row = [*lead, *inside[start : start + size]]
        at = [len(lead) + _BETWEEN * i + rng.randrange(min(size, _BETWEEN)) for i in range(len(some))]
        for place, token in zip(at, some, strict=True):
            row[place] = token
        ids.append(tuple(row))
        places.append(tuple(at))
        # Next to other tokens a name that is one token may not be a whole word any more.
        texts.append("\n".join([tokenizer.decode(row), *tokenizer.batch_decode([[token] for token in some])]))
    return Rows(tuple(ids), tuple(places), tuple(texts))


def text_rows(tokenizer: Any, passages: Sequence[str]) -> Rows:
    """All tokens of `passages`, in rows of at most LONGEST_ROW. A row says what its whole passage does."""
    lead = tokenizer("", add_special_tokens=True)["input_ids"]
    ids, texts = [], []
    for passage in passages:
        for piece in _pieces(tokenizer(passage, add_special_tokens=False)["input_ids"], LONGEST_ROW):
            ids.append((*lead, *piece))
            texts.append(passage)
    return Rows(tuple(ids), tuple(tuple(range(len(lead), len(row))) for row in ids), tuple(texts))


def widened(control: Control, reader: Reader, rows: Rows, tell: Progress) -> Control:
    """`control` with the states of `rows` among its negatives; at other sites than its own, those of every second row.

    What is known of the controls as such stays as it is: means, scatters, kinds, answers.
    """
    first, done = len(control.texts), 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        tell(done, len(rows.ids), "reading text to tell it from")

    states, text = _read(reader, rows, control.site, range(len(rows.ids)), tick)
    half = range(0, len(rows.ids), 2)

    def wider(level: Level) -> Level:
        more, of = _read(reader, rows, level.site, half, None)
        return replace(level, states=torch.cat([level.states, more]), text=torch.cat([level.text, first + of]))

    return replace(
        control,
        texts=control.texts + rows.texts,
        states=torch.cat([control.states, states]),
        text=torch.cat([control.text, first + text]),
        last=torch.cat([control.last, torch.zeros(len(states), dtype=torch.bool)]),
        entity=torch.cat([control.entity, torch.full((len(rows.ids),), -1)]),
        opening=wider(control.opening),
        early=wider(control.early) if control.early else None,
    )


def _pieces(row: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    yield from (row[start : start + size] for start in range(0, len(row), size))


def _read(
    reader: Reader, rows: Rows, site: int, chosen: range, tick: Callable[[int], None] | None
) -> tuple[Tensor, Tensor]:
    """(states [N, D] fp16, RMS-normalised; the number of each one's row [N])."""
    ids, places = [rows.ids[i] for i in chosen], [rows.places[i] for i in chosen]
    states = [normalised(x).half() for x in reader.at(ids, places, site, tick)]
    text = [torch.full((len(x),), i) for i, x in zip(chosen, states, strict=True)]
    return torch.cat(states), torch.cat(text)
