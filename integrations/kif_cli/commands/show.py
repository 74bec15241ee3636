"""kif show: what is in a capsule."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import options
from ..console import out, print_json


def show(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Capsule files.")],
    json: options.Json = False,
) -> None:
    """Print what capsules hold.

    Sites, signatures, bytes, calibration and where they come from.
    """
    from kif_runtime import Capsule

    from ..describing import describe, quality, summary

    found = [(file, Capsule.load(file)) for file in files]
    if json:
        print_json({"capsules": [{"file": str(file)} | describe(capsule) for file, capsule in found]})
        return
    for number, (file, capsule) in enumerate(found):
        if number:
            out().print()
        out().print(f"{capsule.name or capsule.id}  ({file})", style="bold")
        facts = [("id", capsule.id), ("holds", summary(capsule)), ("size", _size(capsule.nbytes, capsule.width))]
        if capsule.aliases:
            facts.append(("aliases", ", ".join(capsule.aliases)))
        facts.append(("made for", f"width {capsule.width}, {capsule.blocks} blocks, model {capsule.model[:12]}"))
        facts += quality(capsule.calibration)
        facts += [(key, _plain(value)) for key, value in sorted(capsule.provenance.items()) if value is not None]
        facts += [("warning", str(text)) for text in capsule.calibration.get("warnings") or ()]
        out().print(_pairs(facts))
        out().print(_signatures(capsule))


def _size(nbytes: int, width: int) -> str:
    return f"{nbytes / 1024:.1f} KiB ({nbytes / width:.0f} bytes per unit of width; the goal is at most 128)"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _pairs(facts: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in facts:
        table.add_row(what, value)
    return table


def _signatures(capsule: Any) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("block", "role", "rank", "gate", "strength", "recall", "false fires asked", "measured"):
        table.add_column(name, justify="left" if name in ("role", "gate") else "right")
    for s in capsule.signatures:
        held = s.calibration
        gate = s.gate if s.gate == "hard" else f"{s.gate} k={s.k:g} τ={s.tau:g}"
        values = [
            _number(held.get(key), form) for key, form in (("recall", ".3f"), ("asked", ".2g"), ("measured", ".2g"))
        ]
        table.add_row(str(s.site), s.role, str(s.rank), gate, f"{float(s.strength):.2f}", *values)
    return table


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "–"
