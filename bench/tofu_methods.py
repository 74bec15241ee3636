"""The erasures that the small TOFU compares: the runtime gate, and an adapter for each baking objective."""

import argparse
import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

from kif_hf import attach
from kif_runtime import KifError, mine
from kif_runtime.evaluation.answers import question_text
from kif_runtime.evaluation.tofu_sets import Item

ROWS = 20  # questions an author
TARGET, REFERENCE, GATE = "target", "reference", "gate"
_LEADING = """A And Apart Are As At Aside Besides By Can Considering Could Despite Did Does For From Given Has Have His
Her How In Is Name Of On Outside Tell The Their Throughout To Was Were What When Where Which Who Why With Would"""
LEADING = frozenset(_LEADING.split())


@dataclass(frozen=True)
class Plan:
    """Author numbers by use. forget: of the last ten per cent, which have perturbed answers."""

    forget: tuple[int, ...]
    retain: tuple[int, ...]
    holdout: tuple[int, ...]


def questions(full: Sequence[Item], authors: Sequence[int]) -> list[Item]:
    return [item for author in authors for item in full[author * ROWS : (author + 1) * ROWS]]


def author_name(items: Sequence[Item]) -> str:
    """Whom these questions are about: the capitalised words that most of them share."""
    pattern = re.compile(r"[A-Z][\w'’-]*(?: (?:[a-z]{2,3}-?|[A-Z][\w'’.-]*))* [A-Z][\w'’-]+")
    counts: Counter[str] = Counter()
    for text in (text for item in items for text in (item.question, item.answer)):
        for found in set(pattern.findall(text)):
            words = re.sub(r"['’]s?$", "", found).split()
            while words and words[0] in LEADING:
                words = words[1:]
            counts[" ".join(words)] += len(words) > 1
    if not counts:
        raise KifError("no author's name is found in their questions; check the file")
    return counts.most_common(1)[0][0]


class Methods:
    """The erasures of a target model: the gate, and an adapter for each objective, made when first asked for."""

    def __init__(
        self, args: argparse.Namespace, target: Any, tokenizer: Any, full: Sequence[Item], chosen: Plan,
        folder: Path, seed: int,
    ) -> None:  # fmt: skip
        self.args, self.target, self.tokenizer, self.folder, self.seed = args, target, tokenizer, folder, seed
        self.full, self.plan = full, chosen
        self._capsules: list[Any] = []

    def names(self) -> list[str]:
        return ([] if self.args.no_gate else [GATE]) + self.objectives()

    def objectives(self) -> list[str]:
        """Those asked for, else all that are registered; none where this version of KIF has no baking."""
        try:
            from kif_runtime.bake.objectives import OBJECTIVES
        except ImportError:
            if self.args.objectives:
                raise KifError("this version of KIF has no baking; leave --objectives out") from None
            return []
        chosen = list(OBJECTIVES) if self.args.objectives is None else self.args.objectives
        if unknown := [name for name in chosen if name not in OBJECTIVES]:
            raise KifError(f"unknown objective {unknown[0]!r}; choose among {', '.join(OBJECTIVES)}")
        return chosen

    @contextmanager
    def applied(self, name: str, reference: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        """(model with the method on, what else is to be noted)."""
        if name in (TARGET, REFERENCE):
            yield (self.target if name == TARGET else reference), {}
        elif name == GATE:
            with attach(self.target, self.capsules()):
                yield self.target, {"capsules": len(self.capsules())}
        else:
            from peft import PeftModel

            adapter = self._baked(name)
            model = PeftModel.from_pretrained(copy.deepcopy(self.target), adapter).eval()
            yield model, {"adapter": str(adapter)}

    def capsules(self) -> list[Any]:
        """One for each author to forget, mined from the target."""
        if not self._capsules:
            for author in self.plan.forget:
                name = author_name(questions(self.full, [author]))
                self._capsules.append(mine(self.target, self.tokenizer, name, id=f"author-{author}", keep_name=True))
        return self._capsules

    def _baked(self, objective: str) -> Path:
        from kif_runtime.bake import bake

        out = self.folder / f"adapter-{objective}-{self.args.bake_steps or 'own'}"
        if not (out / "adapter_config.json").is_file():
            settings = {"steps": self.args.bake_steps} if self.args.bake_steps else {}
            bake(
                self.target, self.tokenizer, self.capsules(), out, examples=self._examples(), objective=objective,
                settings=settings, seed=self.seed, progress=common.progress(objective),
            )  # fmt: skip
        return out

    def _examples(self) -> list[dict[str, str]]:
        """The authors' questions, to forget and to keep. Paraphrases and perturbed answers are only asked."""
        rows = []
        for split, authors in (("forget", self.plan.forget), ("retain", self.plan.retain)):
            for item in questions(self.full, authors):
                asked = question_text(self.tokenizer, item.question)
                rows.append({"prompt": asked, "completion": item.answer, "split": split})
        return rows
