"""Multiple-choice files as one form: a question's options, each a context and what follows it, and which is right.

Formats are told by their fields: {query, choices, gold} (ARC, PIQA as in llm-foundry), {context_options, continuation,
gold} (WinoGrande, likewise), {question, answer, label} with a row per option (ARC challenge), {question, choices,
answer, task} (MMLU) and {question, mc1_targets} (TruthfulQA).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import KifError
from ..files import reason, shown
from .json_lines import Fields, read_rows

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Item:
    """options: each (context, continuation); the continuation, which begins with its space, is what is scored."""

    options: tuple[tuple[str, str], ...]
    gold: int


def load_items(path: str | os.PathLike[str]) -> list[Item]:
    """The questions of a file in any of the formats above. Raises KifError, with file and line, for anything else."""
    first = _first_fields(path)
    for fields, make in _FORMATS:
        if set(fields) <= first:
            items = make(read_rows(path, fields))
            for number, item in enumerate(items, 1):
                if not 0 <= item.gold < len(item.options):
                    raise KifError(f"{shown(path)}, question {number}: the right option is none of them; mend the file")
            return items
    wanted = "; ".join(", ".join(fields) for fields, _ in _FORMATS)
    raise KifError(f"{shown(path)}, line 1: no known multiple-choice format; give rows with one of: {wanted}")


def _first_fields(path: str | os.PathLike[str]) -> set[str]:
    try:
        with Path(path).open(encoding="utf-8") as file:
            row = json.loads(next((line for line in file if line.strip()), "null"))
    except OSError as failure:
        raise KifError(f"cannot read {shown(path)}: {reason(failure)}") from failure
    except ValueError:
        raise KifError(f"{shown(path)}, line 1: no JSON; give a JSON lines file of multiple-choice questions") from None
    return set(row) if isinstance(row, dict) else set()


def _queries(rows: Sequence[dict[str, Any]]) -> list[Item]:
    return [Item(tuple((f"{r['query']}\nAnswer:", f" {c}") for c in r["choices"]), r["gold"]) for r in rows]


def _contexts(rows: Sequence[dict[str, Any]]) -> list[Item]:
    """One continuation after several contexts: partial scoring, as WinoGrande's authors have it."""
    return [Item(tuple((c, f" {r['continuation']}") for c in r["context_options"]), r["gold"]) for r in rows]


def _option_rows(rows: Sequence[dict[str, Any]]) -> list[Item]:
    """Rows of one question stand together, one of them with label 1."""
    items, start = [], 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i]["question"] != rows[start]["question"]:
            some = rows[start:i]
            gold = next((n for n, row in enumerate(some) if row["label"] == 1), -1)
            items.append(Item(tuple((f"Question: {r['question']}\nAnswer:", f" {r['answer']}") for r in some), gold))
            start = i
    return items


def _letters(rows: Sequence[dict[str, Any]]) -> list[Item]:
    """MMLU: the options stand in the prompt, and the letters are scored."""
    items = []
    for row in rows:
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False))
        head = f"The following are multiple choice questions (with answers) about {row['task'].replace('_', ' ')}.\n\n"
        context = f"{head}{row['question']}\n{listed}\nAnswer:"
        items.append(Item(tuple((context, f" {letter}") for letter in LETTERS[: len(row["choices"])]), row["answer"]))
    return items


def _truthful(rows: Sequence[dict[str, Any]]) -> list[Item]:
    items = []
    for row in rows:
        choices, labels = row["mc1_targets"].get("choices") or [], row["mc1_targets"].get("labels") or []
        gold = labels.index(1) if 1 in labels and len(labels) == len(choices) else -1
        items.append(Item(tuple((f"Q: {row['question']}\nA:", f" {choice}") for choice in choices), gold))
    return items


_FORMATS: tuple[tuple[Fields, Any], ...] = (
    ({"query": str, "choices": list, "gold": int}, _queries),
    ({"context_options": list, "continuation": str, "gold": int}, _contexts),
    ({"question": str, "answer": str, "label": int}, _option_rows),
    ({"task": str, "question": str, "choices": list, "answer": int}, _letters),
    ({"question": str, "mc1_targets": dict}, _truthful),
)
