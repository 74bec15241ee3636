"""Which suites there are, and running them one after another so that an audit that was stopped goes on where it was.

A suite is a function of an `Audit` that gives a JSON-able table; its docstring's first line says what it measures. One
that lacks what it needs raises KifError, in words that say which file or option would give it. A table may hold
`attacks`, a list of `Attack` rows: the verdict reads those of every suite.
"""

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict

from ..errors import KifError
from ..files import atomic_write, reason, shown
from .audit import Audit

Table = dict[str, Any]
Suite = Callable[[Audit], Table]

SUITES: dict[str, str] = {  # name → module:function, beside this file
    "facts": "knowledge:run",
    "neighbours": "run:neighbour_rows",
    "text": "run:running_text",
    "dual": "dual:run",
    "attacks": "attacks:run",
    "tofu": "tofu:run",
    "rwku": "rwku:run",
    "utility": "utility:run",
}


class Rate(TypedDict):
    """A share of `tried` tries, with its 95 % interval."""

    tried: int
    success: float
    interval: tuple[float, float]


class Attack(Rate):
    """One attack on the erased model. `success` counts what was known before and is drawn out again.

    access: what the attacker holds, "prompt" (asks only), "gate" (can take a runtime gate off or get round it) or
    "weights" (trains or changes them). budget: in words, with numbers. control: the same on the untouched model, which
    shows that the attack works at all. reference: the same on a model that never knew, or on others' answers; what it
    reaches there is no leak. None where there is none.
    """

    name: str
    access: str
    budget: str
    control: Rate | None
    reference: Rate | None


def available() -> list[str]:
    """The suites whose module is there."""
    return [name for name, home in SUITES.items() if find_spec(f"{__package__}.{home.split(':')[0]}") is not None]


def suite(name: str) -> Suite:
    """The suite called `name`. Raises KifError for an unknown name."""
    if name not in available():
        raise KifError(f"unknown suite {shown(name, 40)!r}; use one of {', '.join(available())}")
    module, function = SUITES[name].split(":")
    return getattr(import_module(f".{module}", __package__), function)


def run_suites(
    audit: Audit,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    clean: Callable[[Table], Table] = dict,
) -> dict[str, Table]:
    """The tables of the suites `names`, in that order, each put through `clean` (which may take names out).

    folder: where each table is kept as soon as it is there, `<suite>.json`, mode 0600; one that was made from the same
    models, facts, seed and profile is read back instead of measured. Raises KifError for an unknown suite, or where a
    table cannot be kept.
    """
    chosen = {name: suite(name) for name in dict.fromkeys(names)}
    tables: dict[str, Table] = {}
    for done, (name, run) in enumerate(chosen.items()):
        audit.report(done, len(chosen), "suites")
        key = f"{name}:{audit.key}"
        kept = _kept(folder, name, key)
        if kept is None:
            asked, saved = audit.outputs.asked, audit.outputs.saved
            kept = {"key": key, "table": clean(run(audit))}
            kept |= {"asked": audit.outputs.asked - asked, "saved": audit.outputs.saved - saved}
            _keep(folder, name, kept)
        else:  # what it took then counts as what the audit took
            audit.outputs.asked += kept["asked"]
            audit.outputs.saved += kept["saved"]
        tables[name] = kept["table"]
    audit.report(len(chosen), len(chosen), "suites")
    return tables


def _kept(folder: Path | None, name: str, key: str) -> dict[str, Any] | None:
    if folder is None:
        return None
    try:
        kept = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or a damaged one: it is measured anew
        return None
    whole = isinstance(kept, dict) and kept.get("key") == key and {"table", "asked", "saved"} <= kept.keys()
    return kept if whole else None


def _keep(folder: Path | None, name: str, kept: dict[str, Any]) -> None:
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(kept, ensure_ascii=False, allow_nan=False)
    except OSError as failure:
        raise KifError(f"cannot create the folder {shown(folder)}: {reason(failure)}") from None
    except ValueError:
        raise KifError(f"the suite {name} gives numbers that are not finite; check the model") from None
    atomic_write(folder / f"{name}.json", text.encode())
