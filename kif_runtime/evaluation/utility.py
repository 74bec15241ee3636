"""The suite `utility`: what the model is still good for. Multiple choice by likelihood, and the perplexity of text.

An option is scored by the log-likelihood of its continuation, in total and per letter; the highest is the answer. The
scores are those of EleutherAI's lm-evaluation-harness (acc and acc_norm). A `.yaml` file beside the others is a task of
that harness and is run by it, on whatever data it names.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import KifError, one_line
from ..files import shown
from .answers import score_tokens
from .audit import Audit
from .facts import Progress
from .states import State
from .statistics import share
from .text import predicted, sample_text
from .utility_tasks import Item, load_items

T = TypeVar("T")
QUICK, FULL = 40, 400
TASK = (".yaml", ".yml")


def run(audit: Audit) -> dict[str, Any]:
    """Accuracy on multiple-choice files and perplexity of the running text, by state.

    {"tasks": [{"task", "questions", state: {"accuracy": share, "normalised": share}}], "harness": [{"task", state: the
    harness's own metrics}], "text": {state: perplexity} or None}. The files are those of the folder, or the file, given
    as `utility`.
    """
    files = task_files(audit.data.get("utility"))
    if not files and audit.text is None:
        raise KifError("utility needs multiple-choice files or running text; give --data utility=FOLDER or --text FILE")
    count = audit.pick(quick=QUICK, full=FULL)
    tasks, harness = [], []
    for path in files:
        if path.suffix in TASK:
            harness.append({"task": path.stem} | {s.name: harness_task(audit, s, path, count) for s in audit.states})
            continue
        items = sampled(load_items(path), count, audit.random(f"utility:{path.name}"))
        row: dict[str, Any] = {"task": path.stem, "questions": len(items)}
        for state in audit.states:
            with audit.running(state) as on:
                row[state.name] = accuracy(on.model, audit.tokenizer, items, progress=audit.progress)
        tasks.append(row)
    return {"tasks": tasks, "harness": harness, "text": text_by_state(audit)}


def task_files(given: str | os.PathLike[str] | None) -> list[Path]:
    """The JSON lines files of a folder and the harness's tasks, by name, or the one file."""
    if given is None:
        return []
    path = Path(given)
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in (".jsonl", *TASK))
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


def harness_task(audit: Audit, state: State, path: Path, limit: int) -> dict[str, float]:
    """The metrics that lm-evaluation-harness gives for its task in `path`, on the first `limit` questions. Raises
    KifError where it is not installed, or fails: data that a task names may have to be downloaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise KifError(
            f"{shown(path)} is a task of lm-evaluation-harness; pip install lm-eval, or give JSON lines files instead"
        )
    import yaml
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with audit.running(state) as on:
        try:
            task = yaml.safe_load(path.read_text(encoding="utf-8"))  # a task may name code to run, which this refuses
            model = HFLM(pretrained=on.model, tokenizer=audit.tokenizer)
            found = simple_evaluate(model=model, tasks=[task], limit=limit, bootstrap_iters=0)
        except Exception as failure:  # whatever goes wrong in a task of somebody else's: it cannot be run
            raise KifError(f"{shown(path)}: lm-evaluation-harness failed: {one_line(failure, 200)}") from failure
    ((_, metrics),) = found["results"].items()
    return {name.partition(",")[0]: value for name, value in metrics.items() if isinstance(value, float)}


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
