"""A bar for each kind of traffic: how KIF's server compares with stock vLLM."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..charts import bars

FIGURES = {
    "tokens_per_second": "Tokens per second", "ttft_p50": "Time to the first token",
    "itl_p50": "Time between tokens", "cpu_seconds": "CPU seconds of the server",
}  # fmt: skip


def plots(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """File name → SVG, of the rows that `Table.ratios` gives."""
    rows = list(rows)
    found = {}
    for name, title in FIGURES.items():
        values = {_kind(row): round(row[name]["ratio"], 3) for row in rows if name in row}
        found[f"serving-{name}"] = bars(title, values, "stock vLLM: 1", limit=1.0)
    return found


def _kind(row: Mapping[str, Any]) -> str:
    capsules = f"{row['capsules']:,} {row['applied']}, {row['touched']} % touched" if row["capsules"] else "idle"
    return f"{capsules}, {row['concurrency']} × {row['prompt']}+{row['output']}{', LoRA' if row['adapter'] else ''}"
