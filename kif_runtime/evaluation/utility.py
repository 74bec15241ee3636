"""The suite `utility`: what the model is still good for. Multiple choice by likelihood, and the perplexity of text.

An option is scored by the log-likelihood of its continuation, in total and per letter; the highest is the answer. The
scores are those of EleutherAI's lm-evaluation-harness (acc and acc_norm), whose tasks run instead where it is
installed and the caller names some.
"""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import KifError
from .answers import score_tokens
from .audit import Audit
from .facts import Progress
from .statistics import share
from .text import predicted, sample_text
from .utility_tasks import Item, load_items

T = TypeVar("T")
QUICK, FULL = 40, 400


def run(audit: Audit) -> dict[str, Any]:
    """Accuracy on multiple-choice files and perplexity of the running text, by state.

    {"tasks": [{"task", "questions", state: {"accuracy": share, "normalised": share}}], "text": {state: perplexity} or
    None}. The files are those of the folder or files given as `utility`; a question counts where every state answers.
    """
    files = task_files(audit.data.get("utility"))
    if not files and audit.text is None:
        raise KifError("utility needs multiple-choice files or running text; give --data utility=FOLDER or --text FILE")
    tasks = []
    for path in files:
        items = sampled(load_items(path), audit.pick(quick=QUICK, full=FULL), audit.random(f"utility:{path.name}"))
        row: dict[str, Any] = {"task": path.stem, "questions": len(items)}
        for state in audit.states:
            with audit.running(state) as on:
                row[state.name] = accuracy(on.model, audit.tokenizer, items, progress=audit.progress)
        tasks.append(row)
    return {"tasks": tasks, "text": text_by_state(audit)}


def task_files(given: str | os.PathLike[str] | None) -> list[Path]:
    """The JSON lines files of a folder, by name, or the one file."""
    if given is None:
        return []
    path = Path(given)
    if path.is_dir():
        return sorted(path.glob("*.jsonl"))
    if not path.is_file():
        raise KifError(f"no such file or folder of multiple-choice questions: {path}; check the path")
    return [path]


def sampled(items: Sequence[T], count: int, random: Any) -> list[T]:
    """At most `count` of them, drawn at random, in the order of the file."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in sorted(random.sample(range(len(items)), count))]


def accuracy(
    model: Any, tokenizer: Any, items: Sequence[Item], *, progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """{"accuracy", "normalised"}: the share of questions whose right option has the highest log-likelihood, in total
    and per letter of the continuation, with intervals. The first of equal scores is the answer."""
    scores = iter(likelihoods(model, tokenizer, [o for item in items for o in item.options], progress=progress))
    total, per_letter = [], []
    for item in items:
        sums = [next(scores) for _ in item.options]
        lengths = [len(text.strip()) for _, text in item.options]
        total.append(_best(sums) == item.gold)
        per_letter.append(_best([s / max(1, n) for s, n in zip(sums, lengths, strict=True)]) == item.gold)
    return {"accuracy": share(total), "normalised": share(per_letter)}


def likelihoods(
    model: Any, tokenizer: Any, options: Sequence[tuple[str, str]], *, progress: Progress | None = None
) -> list[float]:
    """Per (context, continuation), the summed log-likelihood of the continuation's tokens. Context and continuation
    are encoded as one text, and the tokens after those of the context alone are scored; at least one."""
    pairs = []
    for context, continuation in options:
        before = tokenizer(context)["input_ids"]
        whole = tokenizer(context + continuation)["input_ids"]
        at = max(1, min(len(before), len(whole) - 1))
        pairs.append((whole[:at], whole[at:]))
    scored = score_tokens(model, pairs, progress=progress)
    return [float(one.logp.double().sum()) for one in scored]


def text_by_state(audit: Audit) -> dict[str, float] | None:
    """Perplexity of the running text in windows, by state."""
    if audit.text is None:
        return None
    ids = sample_text(audit.tokenizer, audit.text, tokens=audit.pick(quick=4096, full=20480)).ids
    return {s.name: math.exp(sum(audit.losses(s, ids)[0]) / predicted(ids)) for s in audit.states}


def harness_tasks(model: Any, tokenizer: Any, names: Sequence[str], *, limit: int | None = None) -> Mapping[str, Any]:
    """The results of lm-evaluation-harness on its own tasks. Raises KifError where it is not installed or its data
    cannot be had: then use local files. Not tried: where this was written there was no network for its data."""
    if importlib.util.find_spec("lm_eval") is None:
        raise KifError(
            "lm-evaluation-harness is not installed; pip install lm-eval, or give --data utility=FOLDER instead"
        )
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        found = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(names), limit=limit)
    except Exception as failure:  # it downloads its data; whatever fails there, its tasks cannot be run
        raise KifError(f"lm-evaluation-harness failed ({failure}); give --data utility=FOLDER instead") from failure
    return found["results"]


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
