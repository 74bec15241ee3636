"""TOFU's sets, and what is measured of a model on one of them, question by question."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import KifError
from ..files import shown
from . import mia, tofu_metrics
from .answers import answer, question, score_answers
from .facts import Progress
from .json_lines import read_rows
from .outputs import go_on
from .rouge import rouge_l

NEW_TOKENS = 200


@dataclass(frozen=True)
class Item:
    """A question with its answer. paraphrase: the answer in other words, against which `perturbed`, wrong answers of
    the same form, are held; None in sets that hold them against the answer itself."""

    question: str
    answer: str
    perturbed: tuple[str, ...] = ()
    paraphrase: str | None = None

    @property
    def right(self) -> str:
        """What the truth ratio takes as the right answer."""
        return self.paraphrase if self.paraphrase is not None else self.answer


@dataclass(frozen=True)
class Measured:
    """Per item of a set, in its order. Losses are ℓ, the end token included; `truth` is empty without perturbed
    answers, `recall` where nothing was generated. membership: scores by method, lower for what was seen."""

    loss: tuple[float, ...]
    right: tuple[float, ...]
    wrong: tuple[tuple[float, ...], ...]
    truth: tuple[float, ...]
    exact: tuple[float, ...]
    extraction: tuple[float, ...]
    recall: tuple[float, ...]
    membership: dict[str, tuple[float, ...]]

    @property
    def probability(self) -> float:
        return float(np.mean([tofu_metrics.probability(loss) for loss in self.loss]))

    @property
    def paraphrase_probability(self) -> float:
        return float(np.mean([tofu_metrics.probability(loss) for loss in self.right]))

    @property
    def probability_with_options(self) -> float:
        pairs = zip(self.loss, self.wrong, strict=True)
        return float(np.mean([tofu_metrics.probability_with_options(loss, wrong) for loss, wrong in pairs]))


def load_set(path: str | os.PathLike[str], *, perturbed: bool = True) -> list[Item]:
    """A set of TOFU, JSON lines despite its name. Raises KifError for a bad row, with its line.

    perturbed: whether `perturbed_answer` has to be there.
    """
    fields: dict[str, type] = {"question": str, "answer": str}
    rows = read_rows(path, fields | ({"perturbed_answer": list} if perturbed else {}))
    for number, row in enumerate(rows, 1):
        wrong = row.get("perturbed_answer", [])
        if not all(isinstance(text, str) and text.strip() for text in wrong):
            raise KifError(f"{shown(path)}, row {number}: 'perturbed_answer' holds something that is no text; mend it")
    return [
        Item(r["question"], r["answer"], tuple(r.get("perturbed_answer", ())), r.get("paraphrased_answer"))
        for r in rows
    ]


def measure(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    generate: int = NEW_TOKENS,
    gradients: bool = False,
    progress: Progress | None = None,
) -> Measured:
    """generate: tokens of each greedy answer, 0 for none. gradients: whether GradNorm is measured, a backward pass for
    each item. Raises KifError for no items."""
    if not items:
        raise KifError("a set of TOFU has no rows; give one with questions and answers")
    own = score_answers(model, tokenizer, [(i.question, i.answer) for i in items], progress=progress)
    others = [(i.question, text) for i in items for text in i.perturbed]
    paraphrased = [(i.question, i.right) for i in items if i.paraphrase is not None]
    scored = score_answers(model, tokenizer, [*others, *paraphrased], progress=progress)
    losses = iter([one.loss for one in scored])
    wrong = tuple(tuple(next(losses) for _ in i.perturbed) for i in items)
    right = tuple(next(losses) if i.paraphrase is not None else one.loss for i, one in zip(items, own, strict=True))
    membership = {
        "loss": tuple(mia.loss(one) for one in own),
        "zlib": tuple(mia.zlib_score(one, i.answer) for one, i in zip(own, items, strict=True)),
        "min_k": tuple(mia.min_k(one) for one in own),
        "min_k++": tuple(mia.min_k_plus_plus(one) for one in own),
    }
    if gradients:
        pairs = [(question(tokenizer, i.question), answer(tokenizer, i.answer)) for i in items]
        membership["gradnorm"] = tuple(mia.gradient_norms(model, pairs, tokenizer.eos_token_id))
    return Measured(
        loss=tuple(one.loss for one in own),
        right=right,
        wrong=wrong,
        truth=tuple(tofu_metrics.truth_ratio(r, w) for r, w in zip(right, wrong, strict=True)) if others else (),
        exact=tuple(tofu_metrics.exact_memorisation(one) for one in own),
        extraction=tuple(tofu_metrics.extraction_strength(one) for one in own),
        recall=_recalls(model, tokenizer, items, generate) if generate else (),
        membership=membership,
    )


def _recalls(model: Any, tokenizer: Any, items: Sequence[Item], new_tokens: int) -> tuple[float, ...]:
    prompts = [tuple(question(tokenizer, item.question)) for item in items]
    said = go_on(model, tokenizer, prompts, new_tokens)
    return tuple(rouge_l(item.answer, one.text.strip()).recall for item, one in zip(items, said, strict=True))


def find_sets(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Where each set is in a folder of TOFU's files: forget (the largest forgetNN_perturbed), retain, real_authors,
    world_facts, and holdout where there is one. Raises KifError where one of the first four is missing."""
    base = Path(folder)
    forget = sorted(base.glob("forget*_perturbed.json"))
    found = {"forget": forget[-1]} if forget else {}
    for name in tofu_metrics.UTILITY_PARTS:
        if (path := base / f"{name}_perturbed.json").is_file():
            found[name] = path
    if missing := [n for n in ("forget", *tofu_metrics.UTILITY_PARTS) if n not in found]:
        raise KifError(f"{shown(folder)} holds no {missing[0]}_perturbed.json; give the folder of TOFU's sets")
    holdout = sorted(base.glob("holdout*.json"))
    return found | ({"holdout": holdout[-1]} if holdout else {})
