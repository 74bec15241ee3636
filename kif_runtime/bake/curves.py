"""The training log as a picture: the loss terms of each step, and the ratios on held-out prompts."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import BakingError
from ..files import shown

WIDTH, HEIGHT, MARGIN = 640, 220, 48
COLOURS = ("#1b6ca8", "#c0392b", "#27864f", "#8e5ba6", "#b9770e", "#5d6d7e")
LEAST = 1e-6
Curves = dict[str, list[tuple[int, float]]]


def read(log: Path) -> tuple[Curves, Curves]:
    """Loss terms by name and validation ratios by name, each as (step, value). A line that a kill cut off is left out,
    and a step that ran again after it counts as it ran last. Raises BakingError for a log that cannot be read."""
    terms: dict[str, dict[int, float]] = {}
    ratios: dict[str, dict[int, float]] = {}
    try:
        lines = log.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise BakingError(f"{shown(log)} cannot be read; remove the folder and bake again") from None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        for kind, found in (("terms", terms), ("validation", ratios)):
            for name, value in row.get(kind, {}).items():
                found.setdefault(name, {})[row["step"]] = value
    return ({n: sorted(v.items()) for n, v in terms.items()}, {n: sorted(v.items()) for n, v in ratios.items()})


def drawing(log: Path) -> str | None:
    """An SVG of two panels, logarithmic upwards; None where no step was taken."""
    terms, ratios = read(log)
    if not terms:
        return None
    panels = [("loss terms", terms), ("left on held-out prompts", ratios)]
    drawn = [_panel(title, curves, n * HEIGHT) for n, (title, curves) in enumerate((t, c) for t, c in panels if c)]
    size = f'width="{WIDTH}" height="{HEIGHT * len(drawn)}"'
    style = "<style>text{font:12px sans-serif;fill:#555}</style>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{"".join(drawn)}</svg>\n'


def _panel(title: str, curves: Mapping[str, Sequence[tuple[int, float]]], top: int) -> str:
    points = [point for curve in curves.values() for point in curve]
    last = max(1, *(step for step, _ in points))
    logs = [_log(value) for _, value in points]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    high = max(high, low + 1)

    def at(step: int, value: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / last
        y = top + HEIGHT - MARGIN / 2 - (HEIGHT - MARGIN) * (_log(value) - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<text x="{MARGIN}" y="{top + 16}">{title}, {last} steps</text>']
    for power in range(low, high + 1):
        (x, y), (end, _) = at(0, 10.0**power).split(","), at(last, 1).split(",")
        parts.append(f'<path d="M{x} {y}H{end}" stroke="#ddd"/><text x="4" y="{y}">1e{power}</text>')
    for n, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[n % len(COLOURS)]
        line = " ".join(at(step, value) for step, value in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        parts.append(f'<text x="{MARGIN + 200 + 110 * n}" y="{top + 16}" style="fill:{colour}">{name}</text>')
    return "".join(parts)


def _log(value: float) -> float:
    """Of its size: some losses go below 0."""
    return math.log10(max(abs(value), LEAST))
