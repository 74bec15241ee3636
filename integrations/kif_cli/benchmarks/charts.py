"""Two kinds of plot as plain SVG: curves on logarithmic axes, and bars. No library is needed and nothing is fetched."""

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 440, 80, 40, 190, 56
COLOURS = ("#1b6ca8", "#c8553d", "#588157", "#8d6a9f", "#b08900", "#3d405b", "#e07a5f", "#2a9d8f")
Points = Sequence[tuple[float, float]]


def curves(title: str, x_label: str, y_label: str, series: Mapping[str, Points], limit: float | None = None) -> str:
    """Both axes logarithmic, a curve for each name; points at or under 0 are left out. limit: a dashed level."""
    series = {name: [(x, y) for x, y in points if x > 0 and y > 0] for name, points in series.items()}
    across = _Axis([x for points in series.values() for x, _ in points], LEFT, WIDTH - RIGHT)
    heights = [y for points in series.values() for _, y in points] + ([limit] if limit else [])
    up = _Axis(heights, HEIGHT - BOTTOM, TOP)
    parts = [_text(WIDTH / 2 - 40, 20, title, "middle", 15)]
    parts += [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label, "middle"), _turned(18, HEIGHT / 2, y_label)]
    for power in across.powers:
        parts += [_line(across.at(power), TOP, across.at(power), HEIGHT - BOTTOM, "#ddd")]
        parts += [_text(across.at(power), HEIGHT - BOTTOM + 18, f"{power:g}", "middle")]
    for power in up.powers:
        parts += [_line(LEFT, up.at(power), WIDTH - RIGHT, up.at(power), "#ddd")]
        parts += [_text(LEFT - 8, up.at(power) + 4, f"{power:g}", "end")]
    if limit:
        parts += [_line(LEFT, up.at(limit), WIDTH - RIGHT, up.at(limit), "#333", dashed=True)]
    for number, (name, points) in enumerate(series.items()):
        colour, y = COLOURS[number % len(COLOURS)], TOP + 12 + 20 * number
        path = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts += [_line(WIDTH - RIGHT + 12, y, WIDTH - RIGHT + 32, y, colour, 2)]
        parts += [_text(WIDTH - RIGHT + 38, y + 4, name, "start")]
    return _page(parts, HEIGHT)


def bars(title: str, values: Mapping[str, float], unit: str, limit: float | None = None) -> str:
    """A bar for each name, from 0. limit: a dashed line."""
    most = max([*values.values(), limit or 0.0, 1e-9])
    left, height = 260, TOP + 22 * len(values) + 30
    scale = (WIDTH - left - 70) / most
    parts = [_text(WIDTH / 2, 20, f"{title} ({unit})", "middle", 15)]
    for number, (name, value) in enumerate(values.items()):
        y = TOP + 22 * number
        parts.append(f'<rect x="{left}" y="{y}" width="{value * scale:.1f}" height="16" fill="{COLOURS[0]}"/>')
        parts += [_text(left - 8, y + 12, name, "end"), _text(left + value * scale + 6, y + 12, f"{value:g}", "start")]
    if limit:
        parts += [_line(left + limit * scale, TOP - 6, left + limit * scale, height - 24, "#333", dashed=True)]
    return _page(parts, height)


class _Axis:
    """A logarithmic axis over whole powers of ten, from pixel `start` to pixel `end`."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = floor(log10(min(values, default=1.0))), ceil(log10(max(values, default=1.0)))
        self.low, self.high, self.start, self.end = low, max(high, low + 1), start, end
        self.powers = [10.0**n for n in range(self.low, self.high + 1)]

    def at(self, value: float) -> float:
        return self.start + (log10(value) - self.low) / (self.high - self.low) * (self.end - self.start)


def _page(parts: Sequence[str], height: float) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>', *parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'


def _turned(x: float, y: float, text: str) -> str:
    turn = f'transform="rotate(-90 {x:.1f} {y:.1f})"'
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" text-anchor="middle" {turn}>{escape(text)}</text>'


def _line(x: float, y: float, x2: float, y2: float, colour: str, width: int = 1, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    at = f'x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {at} stroke="{colour}" stroke-width="{width}"{dash}/>'
