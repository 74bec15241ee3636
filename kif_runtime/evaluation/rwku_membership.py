"""Membership of Wikipedia passages, as RWKU asks it: about the target (FM), and about others (RM).

All three numbers are log-likelihoods and their like: higher for text that was trained on. Source: RWKU's eval_mia.py.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import mia
from .answers import score_tokens
from .audit import Audit
from .json_lines import read_rows

FILES = {"forget": "forget_mia_sample10.jsonl", "retain": "retain_mia_sample6.jsonl"}
LOWEST = 0.2
WINDOW = 512


def membership(audit: Audit, folder: Path, people: Sequence[str]) -> dict[str, Any] | None:
    """By state and group, means of `passage_scores`; and `auc`, how well the loss tells the target's passages from
    others' (1: plainly members). None without files."""
    if not all((folder / name).is_file() for name in FILES.values()):
        return None
    texts = {group: passages(folder / name, people) for group, name in FILES.items()}
    most = audit.pick(quick=6, full=40)
    texts = {group: some[:most] for group, some in texts.items()}
    if not all(texts.values()):
        return None
    table: dict[str, Any] = {"passages": {group: len(some) for group, some in texts.items()}}
    for state in audit.states:
        with audit.running(state) as on:
            found = {g: passage_scores(on.model, audit.tokenizer, some) for g, some in texts.items()}
        means = {
            group: {key: float(np.mean([one[key] for one in rows])) for key in rows[0]} for group, rows in found.items()
        }
        lost = [[-one["loss"] for one in found[group]] for group in ("forget", "retain")]
        table[state.name] = means | {"auc": mia.auc(*lost)}
    return table


def passages(path: Path, people: Sequence[str]) -> list[str]:
    return [row["text"] for row in read_rows(path, {"text": str, "target_id": str}) if row["target_id"] in people]


def passage_scores(model: Any, tokenizer: Any, texts: Sequence[str], window: int = WINDOW) -> list[dict[str, float]]:
    """Per text {"loss": mean log p of its tokens after the first, "zlib": that over its compressed bytes, "min_k++":
    the mean of the lowest fifth of (log p − μ)/σ}; the first `window` tokens only."""
    ids = [tokenizer(text)["input_ids"][:window] for text in texts]
    scored = score_tokens(model, [(some[:1], some[1:]) for some in ids], batch_size=2)
    return [
        {
            "loss": -one.loss,
            "zlib": -one.loss / len(zlib.compress(text.encode("utf-8"))),
            "min_k++": -mia.min_k_plus_plus(one, LOWEST),
        }
        for one, text in zip(scored, texts, strict=True)
    ]
