"""The texts that mining reads a model with: entities of many kinds, sentence templates, general passages.

All of it ships with the package (`data/`), was written for it (`written.txt` by the embedded model, see
`bench/passages.py`), and is hashed into every capsule's provenance.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from ..errors import MiningError

ANY = "any"
DATA = Path(__file__).parent / "data"
WRITTEN = DATA / "written.txt"


@dataclass(frozen=True)
class Entity:
    """A named thing that serves as a control: its kind (`place`, `person`, …) and finer group (`city`, `writer`, …)."""

    name: str
    kind: str
    group: str


@dataclass(frozen=True)
class Corpus:
    """Entities, templates with one `{}` by kind (and `any`), general passages, and many more that a model wrote."""

    entities: tuple[Entity, ...]
    templates: dict[str, tuple[str, ...]]
    passages: tuple[str, ...]
    written: tuple[str, ...]
    digest: str

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(k for k in self.templates if k != ANY)


@cache
def corpus() -> Corpus:
    """The corpus that ships with the package."""
    files = ("entities.json", "templates.json", "general.txt", WRITTEN.name)
    raw = {name: (DATA / name).read_bytes() for name in files}
    entities = tuple(
        Entity(name, kind, group)
        for kind, groups in json.loads(raw["entities.json"]).items()
        for group, names in groups.items()
        for name in names
    )
    templates = {kind: tuple(lines) for kind, lines in json.loads(raw["templates.json"]).items()}
    passages, written = (
        tuple(p for p in raw[name].decode().split("\n\n") if p.strip()) for name in ("general.txt", WRITTEN.name)
    )
    digest = hashlib.sha256(b"\0".join(raw.values())).hexdigest()
    return Corpus(entities, templates, passages, written, digest)


def checked_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Templates of a user's own. Raises MiningError for one without exactly one `{}`, and for fewer than eight."""
    for number, template in enumerate(templates, 1):
        if not isinstance(template, str) or template.count("{}") != 1:
            raise MiningError(f"prompt {number} has not exactly one {{}} where the subject's name goes; correct it")
    if len(templates) < 8:
        raise MiningError(f"{len(templates)} prompts are too few to calibrate on; give at least 8, or none")
    return tuple(templates)


def mentions(text: str, forms: Sequence[str]) -> bool:
    """Whether `text` names the subject under one of its forms, as whole words and whatever the case."""
    return _naming(tuple(forms)).search(text) is not None


@lru_cache(maxsize=64)
def _naming(forms: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(_whole(form) for form in forms), re.IGNORECASE)


def _whole(form: str) -> str:
    """A pattern of the form as whole words; scripts written without spaces have no word boundary to ask for."""
    spaced = all(unicodedata.east_asian_width(c) not in "WF" for c in form)
    return rf"(?<!\w){re.escape(form)}(?!\w)" if spaced else re.escape(form)


def near_misses(form: str, names: Sequence[str]) -> list[str]:
    """Names a detector of `form` must not fire on: its parts, and its parts joined with those of other names."""
    words = form.split()
    if len(words) < 2:
        return []
    made = [words[0], words[-1], " ".join(words[1:]), " ".join(words[:-1])]
    for name in names:
        other = name.split()
        made.append(" ".join([*words[:-1], other[-1]]))
        made.append(" ".join([*(other[:-1] or other), words[-1]]))
    return [m for m in dict.fromkeys(made) if m.casefold() != form.casefold()]
