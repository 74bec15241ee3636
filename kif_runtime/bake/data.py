"""Texts to forget, to keep, and to validate on: from the templates of mining, from the user, from the model itself.

Templates that validation uses are never trained on, and none of these texts is one that an evaluation asks. Names stay
in memory; nothing here is written.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..capsule import Capsule
from ..errors import BakingError
from ..json_lines import read_lines
from ..mining.corpus import ANY, Entity, corpus, mentions, near_misses
from ..mining.neutral import spread
from ..mining.repeated import repeated
from .examples import FORGET, RETAIN, Example

LONGEST, LONGEST_PASSAGE = 64, 32  # tokens
_ENTITIES, _FEWEST = 225, 60  # others in all, and at least of each kind
_NEAR_PARTNERS, _PASSAGES = 24, 60  # near misses are what a neuron is most easily wrong about
_LED = 0.4  # share of texts that something else comes before
_HELD = 4  # every so many templates of a kind are held out; and all those for anything that mining does not use
_MINED = 24
_HELD_FORGET, _HELD_RETAIN = 32, 16  # prompts to validate on, whatever the number of subjects


@dataclass(frozen=True)
class Subject:
    """Whom a capsule is about: its forms (the name, then aliases) and kind."""

    capsule: Capsule
    forms: tuple[str, ...]

    @property
    def kind(self) -> str:
        return str(self.capsule.calibration.get("kind", ANY))


@dataclass
class Data:
    """Examples of each use. Validation examples are prompts whose next token is asked for."""

    forget: list[Example] = field(default_factory=list)
    retain: list[Example] = field(default_factory=list)
    held_forget: list[Example] = field(default_factory=list)
    held_retain: list[Example] = field(default_factory=list)


def gathered(tokenizer: Any, subjects: Sequence[Subject], own: Sequence[dict[str, str]] = (), seed: int = 0) -> Data:
    """Everything for these subjects, with the user's `own` examples. Raises BakingError where nothing is to forget."""
    forms = [form for s in subjects for form in s.forms]
    data = Data()
    for number, subject in enumerate(subjects):
        rng = random.Random(f"{seed} {number}")
        trained, _ = _templates(tokenizer, subject.kind)
        data.forget += _about(tokenizer, trained, subject.forms, number, rng)
        data.retain += _near(tokenizer, subject, forms, rng)
    rng = random.Random(f"{seed} retain")
    kinds = list(dict.fromkeys(s.kind for s in subjects))
    for kind in kinds:
        trained, _ = _templates(tokenizer, kind)
        others = _entities(kind, forms, rng, max(_FEWEST, _ENTITIES // len(kinds)))
        data.retain += [_text(tokenizer, _led(rng.choice(trained).replace("{}", e.name), rng)) for e in others]
    data.held_forget, data.held_retain = held_out(tokenizer, subjects, seed)
    data.retain += [_text(tokenizer, p, longest=LONGEST_PASSAGE) for p in _passages(forms, rng)]
    for row in own:
        found = data.forget if row["split"] == FORGET else data.retain
        found.append(_given(tokenizer, row, subjects))
    if not data.forget:
        raise BakingError("there is nothing to forget; give a capsule and the subject's name, or forget examples")
    return data


def held_out(tokenizer: Any, subjects: Sequence[Subject], seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Prompts that nothing was trained on: about the subjects, and about others of their kinds."""
    rng = random.Random(f"{seed} held out")
    forms = [form for s in subjects for form in s.forms]
    forget, retain = [], []
    for number, subject in enumerate(subjects):
        _, held = _templates(tokenizer, subject.kind)
        forget += _about(tokenizer, held, subject.forms, number, rng)
        others = _entities(subject.kind, forms, rng, _HELD_RETAIN)
        retain += [_text(tokenizer, rng.choice(held).replace("{}", e.name)) for e in others]
    return rng.sample(forget, min(_HELD_FORGET, len(forget))), rng.sample(retain, _HELD_RETAIN)


def own_examples(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a user's JSON lines file: `prompt`, `completion`, `split` ("forget" or "retain"). Raises BakingError,
    naming file and line, for a bad one; also where no row is there."""
    holds = 'examples; write lines with "prompt", "completion" and "split"'
    return read_lines(path, _row, holds, error=BakingError)


def _row(row: Any) -> dict[str, str]:
    """Raises ValueError for anything that is no example."""
    if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("prompt", "completion", "split")):
        raise ValueError('not an object with texts "prompt", "completion" and "split"')
    if row["split"] not in (FORGET, RETAIN):
        raise ValueError('"split" is neither "forget" nor "retain"')
    if not (row["prompt"] + row["completion"]).strip():
        raise ValueError("prompt and completion are empty")
    return row


def _templates(tokenizer: Any, kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(trained on, held out) for a subject of this kind."""
    data = corpus()
    own = data.templates.get(kind, ()) if kind != ANY else ()
    held = tuple(t for i, t in enumerate(own) if i % _HELD == _HELD - 1)
    trained = (*data.templates[ANY][:_MINED], *(t for t in own if t not in held), *repeated(tokenizer))
    return trained, (*data.templates[ANY][_MINED:], *held)


def _about(
    tokenizer: Any, templates: Sequence[str], forms: Sequence[str], number: int, rng: random.Random
) -> list[Example]:
    """Each form in each template; some again after other text, so that the name's place does not matter."""
    texts = [t.replace("{}", form) for form in forms for t in templates]
    texts += [_led(text, rng, share=1.0) for text in texts if rng.random() < _LED]
    return [_text(tokenizer, text, number, forms) for text in texts]


def _near(tokenizer: Any, subject: Subject, forms: Sequence[str], rng: random.Random) -> list[Example]:
    """Names that share words with the subject's, or the end of one."""
    partners = [e.name for e in _entities(subject.kind, forms, rng, _NEAR_PARTNERS)]
    names = [n for form in subject.forms for n in near_misses(form, partners)]
    names += [n for form in subject.forms for n in _grafted(tokenizer, form, partners, rng)]
    names = [n for n in names if not mentions(n, forms)]
    trained, _ = _templates(tokenizer, subject.kind)
    return [_text(tokenizer, rng.choice(trained).replace("{}", n)) for n in names]


def _grafted(tokenizer: Any, form: str, partners: Sequence[str], rng: random.Random) -> list[str]:
    """Each partner's first token, then the form's later ones: a neuron has to look at more than a name's end."""
    own = tokenizer(form, add_special_tokens=False)["input_ids"]
    if len(own) < 2:
        return []
    starts = [tokenizer(name, add_special_tokens=False)["input_ids"][:1] for name in partners]
    return [str(tokenizer.decode([*start, *own[rng.randrange(1, len(own)) :]])).strip() for start in starts]


def _entities(kind: str, forms: Sequence[str], rng: random.Random, count: int) -> list[Entity]:
    """Others, two in three of the same kind, none of which is a subject or named like one."""
    others = [e for e in corpus().entities if not mentions(e.name, forms)]
    same = spread([e for e in others if e.kind == kind], 2 * count // 3, rng) if kind != ANY else []
    return same + spread([e for e in others if e.kind != kind], count - len(same), rng)


def _passages(forms: Sequence[str], rng: random.Random) -> list[str]:
    silent = [p for p in corpus().passages if not mentions(p, forms)]
    return rng.sample(silent, min(_PASSAGES, len(silent)))


def _led(text: str, rng: random.Random, share: float = _LED) -> str:
    """`text`, or `text` after a sentence about something else."""
    if rng.random() >= share:
        return text
    sentence = rng.choice(rng.choice(corpus().passages).replace("\n", " ").split(". ")).strip(" .")
    return f"{sentence}. {text}"


def _text(tokenizer: Any, text: str, subject: int = -1, forms: Sequence[str] = (), longest: int = LONGEST) -> Example:
    """A text as an example, with the tokens that overlap a form of the name marked."""
    row = tokenizer(text, return_offsets_mapping=True)
    spans = [(at, at + len(form)) for form in forms for at in _places(text, form)]
    name = [i for i, (a, b) in enumerate(row["offset_mapping"]) if b > a and any(a < e and b > s for s, e in spans)]
    return Example(tuple(row["input_ids"][:longest]), 0, subject, tuple(i for i in name if i < longest))


def _places(text: str, form: str) -> list[int]:
    return [i for i in range(len(text)) if text.startswith(form, i)]


def _given(tokenizer: Any, row: dict[str, str], subjects: Sequence[Subject]) -> Example:
    """A user's row: the completion begins after the prompt's tokens, or where there are none after its own first one,
    which nothing foretells."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    if row["split"] == RETAIN:
        return Example(tuple([*prompt, *completion][:LONGEST]), len(prompt))
    number = next((n for n, s in enumerate(subjects) if mentions(row["prompt"], s.forms)), 0)
    whole = _text(tokenizer, row["prompt"], number, subjects[number].forms)
    return Example((*whole.ids, *completion)[: 2 * LONGEST], max(1, len(whole.ids)), number, whole.name)
