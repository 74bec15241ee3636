"""Several audits of one method, a subject each, as one: what `kif eval` would have written of all of them together."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kif_runtime.evaluation.run import kept_summaries
from kif_runtime.evaluation.statistics import bootstrap, interval, wilson

Results = Mapping[str, Any]
EACH_THE_SAME = frozenset({"mass", "perplexity", "touched", "neighbours"})
"""Figures of which every subject has one; the others are means over facts or answers, and count by them."""


def pooled(found: Sequence[Results]) -> dict[str, Any]:
    """One results.json for `found`, each the results of one subject's audit with the same settings.

    Means are over facts, answers or tries, with intervals over subjects; figures that a subject has one of are means
    over subjects. There is no verdict of all together: `verdicts` counts those of the subjects.
    """
    first = found[0]
    facts = [row | {"subject": f"subject {n}"} for n, one in enumerate(found, 1) for row in one["facts"]]
    names = [name for name in first["figures"] if all(name in one["figures"] for one in found)]
    return {
        **{key: first[key] for key in _SHARED},
        "seconds": round(sum(one["seconds"] for one in found), 1),
        "processor_seconds": round(sum(one["processor_seconds"] for one in found), 1),
        "capsules": [capsule for one in found for capsule in one["capsules"]],
        "forwards": {key: sum(one["forwards"][key] for one in found) for key in ("asked", "saved")},
        "suites": [name for name in ("facts", "attacks") if name in first["suites"]],
        "verdict": None,
        "verdicts": dict(Counter(one["verdict"]["verdict"] for one in found)),
        "figures": {name: figure(name, [one["figures"][name] for one in found]) for name in names},
        "policy": None,
        "facts": facts,
        **kept_summaries(facts),
        "questions": questions(found),
        "neighbours": None,
        "text": None,
        "attacks": {"attacks": attacks([one["attacks"]["attacks"] for one in found])},
    }


_SHARED = (
    "format", "kif", "date", "names", "model", "adapter", "erased_model", "reference", "max_false_fire", "form",
    "least_excess", "profile", "seed", "states",
)  # fmt: skip


def figure(name: str, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    weights = [1 if name in EACH_THE_SAME else part["count"] for part in parts]

    def mean(key: str) -> float | None:
        there = [(part[key], w) for part, w in zip(parts, weights, strict=True) if part[key] is not None]
        return sum(value * w for value, w in there) / sum(w for _, w in there) if there else None

    values = [part["after"] for part, w in zip(parts, weights, strict=True) for _ in range(w)]
    subjects = [n for n, w in enumerate(weights) for _ in range(w)]
    own = {key: mean(key) for key in ("after", "before", "reference", "level")}
    ends = bootstrap(values, subjects)
    return {"what": parts[0]["what"], **own, "interval": ends, "count": sum(part["count"] for part in parts)}


def questions(found: Sequence[Results]) -> list[dict[str, Any]]:
    """By kind of question. A subject's facts stand or fall together, so its mean counts once for each of its facts."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for one in found:
        for row in one["questions"]:
            kinds.setdefault(row["question"], []).append(row)
    return [_question(kind, rows) for kind, rows in kinds.items()]


def _question(kind: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    known = [row for row in rows if row["known"]]
    subjects = [n for n, row in enumerate(known) for _ in range(row["known"])]
    made = {"question": kind, "made": rows[0]["made"], "asked": sum(row["asked"] for row in rows)}
    kept: dict[str, Any] = {"facts": len(subjects), "subjects": len(known)}
    made |= {"known": len(subjects), "kept": kept}
    if not known:
        return made

    def spread(of: Callable[[Mapping[str, Any]], float]) -> list[float]:
        return [of(row) for row in known for _ in range(row["known"])]

    for name, ends in (("mean", "interval"), ("beyond", "beyond_interval")):
        values = spread(lambda row, name=name: row["kept"][name])
        kept |= {name: sum(values) / len(values), ends: interval(values, subjects)}
    for what in ("greedy", "rank"):
        made[what] = {s: _mean(spread(lambda row, what=what, s=s: row[what][s])) for s in known[0][what]}
    return made


def attacks(found: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Every attack that any subject's audit tried, its tries put together."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for table in found:
        for row in table:
            rows.setdefault(row["name"], []).append(row)
    return [
        {"name": name, "access": some[0]["access"], "budget": some[0]["budget"]}
        | rate(some)
        | {key: rate([row[key] for row in some if row[key]]) for key in ("control", "reference")}
        for name, some in rows.items()
    ]


def rate(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    tried = sum(part["tried"] for part in parts)
    if not tried:
        return None
    hits = sum(round(part["success"] * part["tried"]) for part in parts if part["tried"])
    return {"tried": tried, "success": hits / tried, "interval": wilson(hits, tried)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
