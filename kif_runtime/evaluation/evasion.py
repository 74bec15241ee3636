"""Other ways to write a name, to measure what gets past the gate. All are deterministic.

Two numbers per way: how often the gate fires all the same, and, among facts that the bare model still knows when asked
that way, how much of the excess knowledge is kept. A name that the model no longer recognises gives nothing away.
"""

import base64
import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import KifError
from .facts import BARE, Fact, Progress, answer_probabilities, batches, excess_kept
from .statistics import summary

Rewriting = Callable[[str], str]

_CYRILLIC = str.maketrans("ABCEHIKMOPTXYaceiopxys", "АВСЕНІКМОРТХУасеіорхуѕ")
_GREEK = str.maketrans("ABEHIKMNOPTXYZaiouv", "ΑΒΕΗΙΚΜΝΟΡΤΧΥΖαιουν")
_LEET = str.maketrans("aeiostAEIOST", "431057431057")
_FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)} | {0x20: 0x3000}
ZERO_WIDTH_SPACE, ZERO_WIDTH_JOINER = "\u200b", "\u200d"


def _longest_word(name: str) -> tuple[int, int]:
    """Start and length of the longest word, the first of several."""
    words = name.split(" ")
    longest = max(words, key=len)
    at = words.index(longest)
    return sum(len(word) + 1 for word in words[:at]), len(longest)


def _inside(name: str) -> int:
    """An index in the middle of the longest word, with a letter on either side where it has two."""
    start, length = _longest_word(name)
    return start + max(1, length // 2)


def swapped(name: str) -> str:
    """Two unequal neighbouring letters in the longest word change places: Paris, Prais."""
    start, length = _longest_word(name)
    inner = [i for i in range(start + 1, start + length - 1) if name[i] != name[i + 1]]
    i = inner[0] if inner else start
    return name[:i] + name[i : i + 2][::-1] + name[i + 2 :]


def dropped(name: str) -> str:
    """A letter in the middle of the longest word is missing."""
    i = min(_inside(name), len(name) - 1)
    return name[:i] + name[i + 1 :] if len(name) > 1 else name


def doubled(name: str) -> str:
    """A letter in the middle of the longest word stands twice."""
    i = min(_inside(name), len(name) - 1)
    return name[: i + 1] + name[i:]


def spaced(name: str) -> str:
    """A space inside the longest word."""
    return name[: _inside(name)] + " " + name[_inside(name) :]


def spelled_out(name: str) -> str:
    """A space after every letter."""
    return " ".join(name)


def zero_width_space(name: str) -> str:
    """An invisible space inside the longest word."""
    return name[: _inside(name)] + ZERO_WIDTH_SPACE + name[_inside(name) :]


def zero_width_joiners(name: str) -> str:
    """An invisible joiner between all letters."""
    return ZERO_WIDTH_JOINER.join(name)


def full_width(name: str) -> str:
    return name.translate(_FULL_WIDTH)


def cyrillic(name: str) -> str:
    """Letters that look alike, taken from Cyrillic."""
    return name.translate(_CYRILLIC)


def greek(name: str) -> str:
    """Letters that look alike, taken from Greek."""
    return name.translate(_GREEK)


def leetspeak(name: str) -> str:
    return name.translate(_LEET)


def rot13(name: str) -> str:
    return codecs.encode(name, "rot13")


def base64_encoded(name: str) -> str:
    return base64.b64encode(name.encode()).decode()


def backwards(name: str) -> str:
    return name[::-1]


REWRITINGS: dict[str, Rewriting] = {
    "unchanged": str,
    "lower case": str.lower,
    "upper case": str.upper,
    "letters swapped": swapped,
    "letter dropped": dropped,
    "letter doubled": doubled,
    "space inside": spaced,
    "spelled out": spelled_out,
    "zero-width space": zero_width_space,
    "zero-width joiners": zero_width_joiners,
    "full-width letters": full_width,
    "Cyrillic look-alikes": cyrillic,
    "Greek look-alikes": greek,
    "leetspeak": leetspeak,
    "rot13": rot13,
    "base64": base64_encoded,
    "reversed": backwards,
}
DESCRIPTION = "description"


def rewritten(facts: Sequence[Fact], way: str, descriptions: Mapping[str, str] | None = None) -> list[tuple[int, Fact]]:
    """(index, fact) for each of `facts` with its subject's name written in this `way`, where that changes it at all.

    way: a key of REWRITINGS, or "description", which puts `descriptions[subject]` ("the land of the Eiffel tower") in
    the name's place. Raises KifError for another way.
    """
    if way != DESCRIPTION and way not in REWRITINGS:
        raise KifError(f"unknown rewriting {way!r}; use one of {', '.join(REWRITINGS)} or {DESCRIPTION}")
    found = []
    for index, fact in enumerate(facts):
        name = (descriptions or {}).get(fact.subject) if way == DESCRIPTION else REWRITINGS[way](fact.subject)
        if name and (name != fact.subject or way == "unchanged"):
            found.append((index, fact.about(name)))
    return found


def evade(
    model: Any,
    tokenizer: Any,
    attach: Callable[[], Any],
    facts: Sequence[Fact],
    priors: Sequence[float],
    *,
    ways: Sequence[str] | None = None,
    descriptions: Mapping[str, str] | None = None,
    form: str = BARE,
    least_excess: float = 0.15,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Per way of writing the name: `asked` facts, `fired` (share of prompts on which anything fired), and `kept`, the
    summary of excess knowledge over facts that the bare model still knows so (before − prior at least `least_excess`).

    attach() gives a context manager with `fired_rows` and `reset()`, as kif_hf.attach does. priors: as measured for the
    names unchanged. Per-fact values come along as `rows`, for whoever puts several subjects together.
    """
    chosen = list(REWRITINGS) + ([DESCRIPTION] if descriptions else []) if ways is None else list(ways)
    result: dict[str, dict[str, Any]] = {}
    for done, way in enumerate(chosen, 1):
        asked = rewritten(facts, way, descriptions)
        if asked:
            before = answer_probabilities(model, tokenizer, [f for _, f in asked], form=form)
            after, fired = _attached(model, tokenizer, attach, [f for _, f in asked], form)
            rows = [
                _row(facts[i], priors[i], b, a, fires, least_excess)
                for (i, _), b, a, fires in zip(asked, before, after, fired, strict=True)
            ]
            result[way] = together(rows)
        if progress is not None:
            progress(done, len(chosen), "rewritings")
    return result


def together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table entry for the rows of one way, of one subject or of many."""
    known = [row for row in rows if row["kept"] is not None]
    return {
        "asked": len(rows),
        "fired": sum(row["fired"] for row in rows) / len(rows) if rows else None,
        "kept": summary([row["kept"] for row in known], [row["subject"] for row in known]),
        "rows": list(rows),
    }


def _row(fact: Fact, prior: float, before: float, after: float, fired: bool, least: float) -> dict[str, Any]:
    kept = excess_kept(before, after, prior) if before - prior >= least else None
    return {"subject": fact.subject, "before": before, "after": after, "prior": prior, "fired": fired, "kept": kept}


def _attached(
    model: Any, tokenizer: Any, attach: Callable[[], Any], facts: Sequence[Fact], form: str
) -> tuple[list[float], list[bool]]:
    """Probabilities, and whether anything fired on each prompt."""
    after, fired = [0.0] * len(facts), [False] * len(facts)
    with attach() as kif:
        kif.reset()
        for indices, values in batches(model, tokenizer, facts, form=form):
            counts = kif.fired_rows.values()
            for row, (index, value) in enumerate(zip(indices, values, strict=True)):
                after[index], fired[index] = value, any(rows[row] for rows in counts)
            kif.reset()
    return after, fired
