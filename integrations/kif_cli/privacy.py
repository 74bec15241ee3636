"""What leaves an audit without names: an erasure request is itself private, and results get passed on."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kif_runtime.errors import CapsuleError
from kif_runtime.ids import is_opaque, slug

if TYPE_CHECKING:
    from kif_runtime.capsule import Capsule
    from kif_runtime.evaluation.audit import Subject

TOLD = frozenset({"prompt", "prompts", "answer", "answers", "text", "texts", "said", "relation", "example", "examples"})
"""Keys whose text is a question, or what a model says: it may tell who it is about without the name."""


def as_it_is(value: Any) -> Any:
    """What stands in a cleaner's place where names were asked for."""
    return value


def cleaner(
    subjects: "Sequence[Subject]", others: Sequence[str] = (), capsules: "Sequence[Capsule]" = ()
) -> Callable[[Any], Any]:
    """A function that takes a JSON-able table and gives it without names.

    Each subject is called "subject 1" and so on wherever its name, an alias or the id made of them stands, and what a
    capsule says its own is; `others` "other 1". Spaces, hyphens, underscores or nothing may join a name's words. Texts
    under keys of TOLD are None. Keys stay, but for the ids under `touched`.
    """
    called: dict[tuple[str, ...], str] = {}
    asked = [subject.names for subject in subjects]
    held = [(c.id, *(name for name in (c.name, *c.aliases) if name)) for c in capsules if not is_opaque(c.id)]
    for names in (*asked, *held):  # a capsule's subject is mostly one of those asked about
        written = {words for name in names for words in _written(name)}
        known = next((called[words] for words in sorted(written) if words in called), None)
        label = known or f"subject {len(set(called.values())) + 1}"
        called |= {words: label for words in written if words not in called}
    for number, other in enumerate(others, 1):
        called |= {words: f"other {number}" for words in _written(other) if words not in called}
    longest_first = sorted(called, key=lambda words: len("".join(words)), reverse=True)
    letter = r"[^\W_]"
    every = "|".join(r"[\s_-]*".join(map(re.escape, words)) for words in longest_first)
    pattern = re.compile(rf"(?<!{letter})(?:{every or '(?!)'})(?!{letter})", re.IGNORECASE)
    joined = {"".join(words): label for words, label in called.items()}

    def text(value: str) -> str:
        return pattern.sub(lambda found: joined.get(re.sub(r"[\s_-]", "", found.group().lower()), "a subject"), value)

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


def _written(name: str) -> set[tuple[str, ...]]:
    """The name's words, and those of the id made of it, in lower case."""
    found = {name.lower()}
    with suppress(CapsuleError):  # no letter in it
        found.add(slug(name).lower())
    return {words for form in found if (words := tuple(filter(None, re.split(r"[\s_-]+", form))))}
