"""What the page of an audit draws: bars before and after with their intervals, and lines over the blocks. Numbers only;
the templates make SVG of them."""

from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 320, 132  # of a chart's drawing area, in its own units
GROUPS: dict[str, tuple[str, ...]] = {
    "Asked": ("kept", "asked_otherwise", "said", "said_when_opened", "mentioned", "mass", "refused"),
    "Looked for inside": ("lens", "shallow"),
    "Attacked": ("recovered_by_asking", "recovered_by_changing"),
    "What it cost": ("neighbours", "perplexity", "touched"),
}
RATIOS = frozenset({"mass", "perplexity"})
SMALL = {"neighbours": 0.01, "touched": 0.001}  # the least that fills a row: less is hardly anything


def bars(figures: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per group, the figures that were measured as rows to draw: everything a share of the row's full length."""
    groups = []
    for title, names in GROUPS.items():
        rows = [_row(name, figures[name]) for name in names if name in figures]
        if rows:
            groups.append({"title": title, "rows": rows})
    return groups


def _row(name: str, figure: Mapping[str, Any]) -> dict[str, Any]:
    present = [figure[part] for part in ("after", "before", "reference", "level") if figure[part] is not None]
    full = max(SMALL.get(name, 1.0), *present, *(figure["interval"] or () if name in SMALL else ()))
    marks = {part: _clipped(figure[part], full) for part in ("before", "after", "reference", "level")}
    interval = [_clipped(end, full) for end in figure["interval"]] if figure["interval"] else None
    return {"name": name, "what": figure["what"], "figure": figure, "marks": marks, "interval": interval} | {
        "shown": {part: shown(name, figure[part]) for part in ("before", "after", "reference", "level")},
        "between": [shown(name, end) for end in figure["interval"]] if figure["interval"] else None,
    }


def _clipped(value: float | None, full: float) -> float | None:
    return None if value is None else round(100 * min(1.0, max(0.0, value / full)), 2)


def shown(name: str, value: float | None) -> str:
    """A figure as a reader takes it in: a share in per cent, a ratio with a cross, a small change as it is."""
    if value is None:
        return "–"
    if name in RATIOS:
        return f"× {value:.3g}"
    if name in SMALL:
        return f"{value:.2g}" if value else "0"
    return f"{100 * value:.0f} %".replace("-", "−")


def lines(
    rows: Sequence[Mapping[str, Any]] | None, names: Sequence[tuple[str, str, str]], top: float | None = None
) -> dict[str, Any] | None:
    """A chart over blocks: for each (key, label, class) of `names` that the rows have, the points of a polyline.

    top: the value at the upper edge; the largest one if left out.
    """
    rows = [row for row in rows or ()]
    present = [one for one in names if rows and any(row.get(one[0]) is not None for row in rows)]
    if len(rows) < 2 or not present:
        return None
    values = [row[key] for row in rows for key, _, _ in present if row.get(key) is not None]
    low, high = min(0.0, *values), max(values) if top is None else top
    scale = (high - low) or 1.0
    series = [
        {"label": label, "style": style, "points": " ".join(_points(rows, key, low, scale)), "last": rows[-1].get(key)}
        for key, label, style in present
    ]
    return {"series": series, "low": low, "high": high, "last": len(rows) - 1, "width": WIDTH, "height": HEIGHT}


def _points(rows: Sequence[Mapping[str, Any]], key: str, low: float, scale: float) -> list[str]:
    step = WIDTH / (len(rows) - 1)
    return [
        f"{n * step:.1f},{HEIGHT * (1 - (row[key] - low) / scale):.1f}"
        for n, row in enumerate(rows)
        if row.get(key) is not None
    ]


def charts(dual: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The charts of the suite dual: the logit lens, the depth of the erasure, and likeness to the untouched model."""
    if not dual:
        return []
    inside = dual["inside"]
    states = [("before", "before", "before"), ("after", "after", "after"), ("reference", "reference", "reference")]
    prior = [*states, ("prior", "asked about others", "prior")]
    depth = [("never_knew", "never knew", "prior"), ("drop", "after", "after")]
    alike = [("cka_own", "the subject", "after"), ("cka_others", "others", "before")]
    near = [("neighbours_own", "the subject", "after"), ("neighbours_others", "others", "before")]
    apart = [("before", "before", "before"), ("after", "after", "after")]
    drawn = [
        ("The answer, seen between the blocks", "probability by the logit lens", inside["lens"]["blocks"], prior, None),
        ("What the erased states cost the answer", "drop in log p, patched", inside["patching"]["blocks"], depth, None),
        ("Likeness to the untouched model", "linear CKA", inside["similarity"], alike, 1.0),
        ("Nearest neighbours kept", "share", inside["similarity"], near, 1.0),
        ("Subject told from others", "Cohen's d", inside["separation"], apart, None),
    ]
    found = []
    for title, unit, rows, names, top in drawn:
        chart = lines(rows, names, top)
        if chart:
            found.append({"title": title, "unit": unit} | chart)
    return found


def numbers(table: Mapping[str, Any], most: int = 60) -> list[tuple[str, str]]:
    """(where, value) for the plain numbers in a suite's table: what a page shows of any suite. In a list, rows count
    that are named by their first text, as a task is; other lists are left out."""
    found: list[tuple[str, str]] = []

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(item, (*path, str(key).replace("_", " ")))
        elif isinstance(value, list | tuple):
            for item in value:
                texts = [text for text in item.values() if isinstance(text, str)] if isinstance(item, Mapping) else []
                if texts:
                    walk(item, (*path, texts[0]))
        elif isinstance(value, bool | str) or value is None:
            return
        else:
            found.append((", ".join(path), f"{value:.4g}".replace("-", "−")))

    walk({key: item for key, item in table.items() if key != "attacks"}, ())
    return found[:most]
