"""What `kif eval` writes as results.json, and what of it other results are compared with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kif_runtime.errors import KifError
from kif_runtime.files import reason, shown

from .console import out
from .picture import shown as figure_shown

if TYPE_CHECKING:
    from kif_runtime.evaluation.audit import Audit

SCHEMA = Path(__file__).parent / "data" / "results.schema.json"
VERSION = 2  # of the format


def results(audit: "Audit", tables: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, Any]:
    """The whole record: `about` (what was compared, and how), the tables, figures and verdict.

    The table of the suite facts stands at the top level, as it always has; the others under their names.
    """
    from kif_runtime import __version__
    from kif_runtime.evaluation.figures import WORDS, figures
    from kif_runtime.evaluation.verdict import verdict

    measured = {name: figure for name, figure in figures(tables).items() if figure.after is not None}
    facts = tables.get("facts", {"facts": [], "kept": {"facts": 0, "subjects": 0}, "questions": []})
    named = {name: table for name, table in tables.items() if name != "facts"}
    return {
        "format": VERSION,
        "kif": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **about,
        "form": audit.form,
        "least_excess": audit.least_excess,
        "profile": "quick" if audit.quick else "full",
        "seed": audit.seed,
        "suites": list(tables),
        "states": {state.name: {"removable": state.removable} for state in audit.states},
        "forwards": {"asked": audit.outputs.asked, "saved": audit.outputs.saved},
        "verdict": verdict(tables, removable=audit.after.removable) if "facts" in tables else None,
        "figures": {name: {"what": WORDS[name]} | asdict(figure) for name, figure in measured.items()},
        "policy": None,
        **facts,
        **{"neighbours": None, "text": None},
        **named,
    }


def load_results(folder: Path) -> dict[str, Any]:
    """The results in a folder, for comparison. Raises KifError for what this version of `kif eval` did not write."""
    file = folder / "results.json" if folder.is_dir() else folder
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as failure:
        raise KifError(f"cannot read {shown(file)}: {reason(failure)}") from None
    except (ValueError, RecursionError):
        raise KifError(f"{shown(file)} is no JSON; give a folder that kif eval wrote") from None
    if not isinstance(found, dict) or found.get("format") != VERSION or "figures" not in found:
        raise KifError(f"{shown(file)} is not what this version of kif eval writes; evaluate that model again")
    return found


def compared(columns: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One column for each model, or method, of the page: its label, verdict and figures. verdicts: how often each was
    given, where several audits were put together."""
    return [
        {"label": label, "verdict": found["verdict"], "verdicts": found.get("verdicts"), "figures": found["figures"]}
        for label, found in columns
    ]


def print_results(found: Mapping[str, Any]) -> None:
    """The verdict, then every figure that was measured, then the checks of a policy."""
    if verdict := found["verdict"]:
        out().print(f"{verdict['verdict']} (confidence: {verdict['confidence']})", style="bold")
        out().print(verdict["sentence"])
        for doubt in verdict["why_not_surer"]:
            out().print(f"  but: {doubt}", style="dim")
    grid = Table.grid(padding=(0, 2))
    for name, figure in found["figures"].items():
        interval = figure["interval"]
        ends = f"[{figure_shown(name, interval[0])}, {figure_shown(name, interval[1])}]" if interval else ""
        moved = f"{figure_shown(name, figure['before'])} → {figure_shown(name, figure['after'])}"
        grid.add_row(figure["what"], moved, ends)
    out().print(grid)
    if asked := found["forwards"]["asked"]:
        saved = found["forwards"]["saved"]
        out().print(f"{asked:,} prompts asked; {saved:,} ({100 * saved / asked:.0f} %) had been answered before")
    for check in found["policy"]["checks"] if found["policy"] else []:
        out().print(f"{'✓' if check['passed'] else '✗'} {check['text']} {check['detail']}")
