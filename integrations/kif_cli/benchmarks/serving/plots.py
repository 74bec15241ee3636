"""A bar for each kind of traffic: how KIF's server compares with stock vLLM."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..charts import bars

FIGURES = {
    "tokens_per_second": "Tokens per second", "ttft_p50": "Time to the first token",
    "itl_p50": "Time between tokens",
}  # fmt: skip


def plots(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """File name → SVG, of the rows that `Table.ratios` gives."""
    rows = list(rows)
    return {
        f"serving-{name}": bars(title, {_kind(r): round(r[name]["ratio"], 3) for r in rows}, "stock vLLM: 1", limit=1.0)
        for name, title in FIGURES.items()
    }


def _kind(row: Mapping[str, Any]) -> str:
    capsules = f"{row['capsules']:,} {row['applied']}, {row['touched']} % touched" if row["capsules"] else "idle"
    return f"{capsules}, {row['concurrency']} × {row['prompt']}+{row['output']}{', LoRA' if row['adapter'] else ''}"
