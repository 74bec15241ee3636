"""What leaves an audit without names: an erasure request is itself private, and results get passed on."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kif_runtime.errors import CapsuleError
from kif_runtime.ids import slug

if TYPE_CHECKING:
    from kif_runtime.evaluation.audit import Subject

TOLD = frozenset({"prompt", "prompts", "answer", "answers", "text", "texts", "said", "relation", "example", "examples"})
"""Keys whose text is a question, or what a model says: it may tell who it is about without the name."""


def as_it_is(value: Any) -> Any:
    """What stands in a cleaner's place where names were asked for."""
    return value


def cleaner(subjects: "Sequence[Subject]", others: Sequence[str] = ()) -> Callable[[Any], Any]:
    """A function that takes a JSON-able table and gives it without names.

    Each subject is called "subject 1" and so on wherever its name, an alias or the id made of them stands; `others`
    "other 1". Texts under keys of TOLD are None. Keys stay, but for the ids under `touched`.
    """
    names: dict[str, str] = {}
    for number, subject in enumerate(subjects, 1):
        for name in subject.names:
            names |= {written: f"subject {number}" for written in _written(name)}
    for number, other in enumerate(others, 1):
        names |= {written: f"other {number}" for written in _written(other) if written not in names}
    longest_first = sorted(names, key=len, reverse=True)
    letter = r"[^\W_]"
    words = "|".join(map(re.escape, longest_first))
    pattern = re.compile(rf"(?<!{letter})(?:{words})(?!{letter})", re.IGNORECASE)

    def text(value: str) -> str:
        return pattern.sub(lambda found: names.get(found.group().lower(), "a subject"), value)

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return text(value)
        if isinstance(value, dict):
            return {key: _entry(key, item) for key, item in value.items()}
        return [clean(item) for item in value] if isinstance(value, list | tuple) else value

    def _entry(key: str, item: Any) -> Any:
        if key in TOLD and isinstance(item, str | list | tuple):
            return None
        if key == "touched" and isinstance(item, dict):
            return {text(id): count for id, count in item.items()}
        return clean(item)

    return clean


def _written(name: str) -> set[str]:
    found = {name.lower()}
    with suppress(CapsuleError):  # no letter in it
        found.add(slug(name).lower())
    return found
