"""What is measured: the grid, and the table that every figure goes into as it comes."""

import csv
import io
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal

from kif_runtime.errors import KifError
from kif_runtime.files import atomic_write, shown

Applied = Literal["mandatory", "resident"]
FIGURES = ("tokens_per_second", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "cpu_seconds")


@dataclass(frozen=True)
class Load:
    """A server with `capsules` capsules, mandatory or only resident."""

    capsules: int
    applied: Applied


@dataclass(frozen=True)
class Cell:
    """One kind of traffic. touched: percent of the requests on which a capsule fires. prompt, output: tokens."""

    capsules: int
    applied: Applied
    touched: int
    concurrency: int
    prompt: int
    output: int
    adapter: bool


@dataclass(frozen=True)
class Grid:
    """Every combination of these is a cell, but that a server without capsules touches nothing."""

    sizes: Sequence[int]
    applied: Sequence[Applied]
    touched: Sequence[int]
    concurrency: Sequence[int]
    lengths: Sequence[tuple[int, int]]
    adapter: Sequence[bool]
    requests: int
    rounds: int
    seed: int = 0

    def loads(self) -> list[Load]:
        """A server is started for each of these."""
        return list(dict.fromkeys(Load(n, a if n else "resident") for n, a in product(self.sizes, self.applied)))

    def cells(self, load: Load) -> list[Cell]:
        touched = self.touched if load.capsules else (0,)
        return [
            Cell(load.capsules, load.applied, t, c, p, o, a)
            for a, (p, o), c, t in product(self.adapter, self.lengths, self.concurrency, touched)
        ]

    @property
    def longest(self) -> int:
        return max(p + o for p, o in self.lengths)


_KEYS = [f.name for f in fields(Cell)]


class Table:
    """Rows of one run, in a CSV file that grows by one row for each figure taken; None keeps them in memory alone.

    Every row holds the cell, the round, which server it is of, and what it stands on. What a file holds already is not
    measured again. Raises KifError for a file whose rows stand on something else, or on an unclean tree, whose code may
    have changed.
    """

    def __init__(self, path: Path | None, stands_on: Mapping[str, Any]) -> None:
        self.path, self.stands_on = path, {k: _text(v) for k, v in stands_on.items()}
        self.rows: list[dict[str, str]] = []
        if path is not None and path.exists():
            self.rows = _read(path)
            for row in self.rows:
                if other := sorted(k for k, v in self.stands_on.items() if row.get(k) != v):
                    raise KifError(f"{shown(path)} was measured with another {other[0]}; name another folder")
            if self.rows and self.stands_on.get("clean_tree") == "False":
                raise KifError(f"{shown(path)} is of an unclean tree, which may have changed; name another folder")

    def holds(self, cell: Cell, turn: int) -> bool:
        wanted = _names(cell) | {"round": str(turn)}
        return any(wanted.items() <= row.items() for row in self.rows)

    def add(self, cell: Cell, turn: int, measured: Mapping[str, Mapping[str, Any]]) -> None:
        """measured: server ("stock", "kif") → its figures. Both or none are in the file, whatever happens."""
        for server, found in measured.items():
            row = asdict(cell) | {"round": turn, "server": server} | dict(found)
            self.rows.append({k: _text(v) for k, v in row.items()} | self.stands_on)
        if self.path is not None:
            _append(self.path, self.rows[-len(measured) :], header=len(self.rows) == len(measured))

    def ratios(self) -> list[dict[str, Any]]:
        """One row for each cell: the median, lowest and highest ratio to stock over its rounds, of each figure.

        touched_seen: percent of requests on which a capsule fired. gate_share: of the forward's time, spent at sites.
        """
        found = []
        for cell in dict.fromkeys(tuple(row[k] for k in _KEYS) for row in self.rows):
            pairs = list(_pairs(row for row in self.rows if tuple(row[k] for k in _KEYS) == cell))
            line: dict[str, Any] = dict(zip(_KEYS, map(_value, cell), strict=True)) | {"rounds": len(pairs)}
            for name in ("touched_seen", "gate_share"):
                line[name] = sum(float(k[name]) for _, k in pairs) / len(pairs)
            for name in FIGURES:
                ratios = [float(k[name]) / float(s[name]) for s, k in pairs if float(s[name])]
                if not ratios:  # no such figure on this system
                    continue
                line[name] = {
                    "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
                    "stock": statistics.median(float(s[name]) for s, _ in pairs),
                }  # fmt: skip
            found.append(line)
        return found


def _pairs(rows: Iterable[dict[str, str]]) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    by_round: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        by_round.setdefault(row["round"], {})[row["server"]] = row
    yield from ((both["stock"], both["kif"]) for both in by_round.values())


def _read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, which are pairs; what a crash has torn off is taken out of it, too."""
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    whole = "".join(lines[: len(lines) - (len(lines) - 1) % 2])
    if whole != text:
        atomic_write(path, whole.encode())
    return list(csv.DictReader(io.StringIO(whole)))


def _append(path: Path, rows: list[dict[str, str]], header: bool) -> None:
    """In one write, and on the disk when this returns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, text.getvalue().encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def _names(cell: Cell) -> dict[str, str]:
    return {k: _text(v) for k, v in asdict(cell).items()}


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(text: str) -> Any:
    return int(text) if text.isdigit() else text == "True" if text in ("True", "False") else text
