"""One baking and what became of it: the pieces that the tables of `bake_table.py` are made of, kept as they come."""

import argparse
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import torch

from kif_hf import attach
from kif_runtime import Capsule, KifError
from kif_runtime.bake import bake
from kif_runtime.bake.continuing import Earlier
from kif_runtime.evaluation.attacks.quantisation import quantised_answers
from kif_runtime.evaluation.attacks.relearning import BATCH, RATE, STEPS, relearn_same
from kif_runtime.evaluation.facts import Fact, answer_probabilities, prior_probabilities
from kif_runtime.evaluation.run import fact_row, text_table
from kif_runtime.evaluation.text import predicted, sample_text, window_losses

RELEARNING = f"{STEPS} steps of AdamW at {RATE:g} on the facts asked, {BATCH} a step, all weights"


@dataclass(frozen=True)
class Plan:
    """What to bake and what to ask. follows: the piece whose adapter this one continues. attacks: also ask after
    relearning and after 4 bits. near: also ask about others and read running text. settings: those of the training."""

    key: str
    subjects: tuple[str, ...]
    objective: str = "capsule"
    durability: tuple[str, ...] = ()
    follows: "Plan | None" = None
    attacks: bool = False
    near: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def erased(self) -> tuple[str, ...]:
        """All subjects that the adapter is about, the earliest first."""
        return (*(self.follows.erased if self.follows else ()), *self.subjects)


class Pieces:
    """Makes pieces and keeps them in a journal; a piece that is there is not made again."""

    def __init__(
        self, model: Any, tokenizer: Any, facts: Sequence[Fact], capsules: dict[str, Capsule],
        options: argparse.Namespace, folder: Path,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.facts, self.capsules = model, tokenizer, facts, capsules
        self.folder, self.seed = folder, options.seed
        self.others = random.Random(options.seed).sample(
            [f for f in facts if f.subject not in capsules], options.neighbours
        )
        self.ids = None
        if options.text:
            self.ids = sample_text(tokenizer, common.read_text(options.text), tokens=options.tokens).ids
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.journal = common.Journal(folder / "pieces.jsonl")
        self.before = self._kept("before", self._untouched)

    def __call__(self, plan: Plan) -> dict[str, Any]:
        return self._kept(plan.key, lambda: self._made(plan))

    def attached(self, subjects: Sequence[str]) -> dict[str, Any]:
        """The same questions with the subjects' capsules attached and nothing baked."""

        def ask() -> dict[str, Any]:
            with attach(self.model, [self.capsules[name] for name in subjects]):
                return self._asked(subjects, near=True, text=False)

        return self._kept("attached " + " | ".join(subjects), ask)

    def has(self, plan: Plan) -> bool:
        return plan.key in self.journal.rows

    def _kept(self, key: str, make: Any) -> dict[str, Any]:
        if key not in self.journal.rows:
            self.journal.append(key, make())
            common.say(f"done: {key}")
        return self.journal.rows[key]

    def _untouched(self) -> dict[str, Any]:
        own = [f for f in self.facts if f.subject in self.capsules]
        return {
            "facts": answer_probabilities(self.model, self.tokenizer, own),
            "priors": prior_probabilities(self.model, self.tokenizer, own),
            "others": answer_probabilities(self.model, self.tokenizer, self.others),
            "losses": None if self.ids is None else window_losses(self.model, self.ids),
        }

    def _made(self, plan: Plan) -> dict[str, Any]:
        folder = self._adapter(plan)
        shutil.rmtree(folder, ignore_errors=True)
        capsules = [self.capsules[name] for name in plan.subjects]
        forget_peak()
        begun, cpu = time.perf_counter(), time.process_time()
        with torch.enable_grad():
            made = bake(
                self.model, self.tokenizer, capsules, folder, objective=plan.objective, settings=plan.settings,
                names={self.capsules[name].id: [name] for name in plan.subjects}, durability=plan.durability,
                seed=self.seed, continue_from=self._adapter(plan.follows) if plan.follows else None,
            )  # fmt: skip
        result = {
            "subjects": len(plan.subjects), "seconds": time.perf_counter() - begun, "cpu": time.process_time() - cpu,
            "gb": peak(), "bytes": made.nbytes, "steps": made.provenance["steps"], "ratios": made.ratios,
        }  # fmt: skip
        with Earlier(folder).at_work(self.model):
            result |= self._asked(plan.erased, near=plan.near)
            if plan.attacks:
                asked = [f for f in self.facts if f.subject in plan.erased]
                for name, attack in (("relearned", relearn_same), ("four_bit", quantised_answers)):
                    outcome = attack(self.model, self.tokenizer, asked)
                    result[name] = self._rows(asked, outcome.probabilities)
        return result

    def _adapter(self, plan: Plan) -> Path:
        return self.folder / common.digest(plan.key)

    def _asked(self, subjects: Sequence[str], near: bool, text: bool = True) -> dict[str, Any]:
        own = [f for f in self.facts if f.subject in subjects]
        result: dict[str, Any] = {"facts": self._rows(own, answer_probabilities(self.model, self.tokenizer, own))}
        if near:
            now = answer_probabilities(self.model, self.tokenizer, self.others)
            result["moved"] = [abs(a - b) for a, b in zip(now, self.before["others"], strict=True)]
            if text and self.ids is not None:
                losses = window_losses(self.model, self.ids)
                result["perplexity"] = text_table(self.before["losses"], losses, predicted(self.ids))["ratio"]
        return result

    def _rows(self, asked: Sequence[Fact], after: Sequence[float]) -> list[dict[str, Any]]:
        own = [f for f in self.facts if f.subject in self.capsules]
        known = dict(zip(own, zip(self.before["facts"], self.before["priors"], strict=True), strict=True))
        priors = [known[f][1] if known[f][1] is not None else (f.p_prior or 0.0) for f in asked]
        return [fact_row(f, known[f][0], p, prior) for f, p, prior in zip(asked, after, priors, strict=True)]


def forget_peak() -> None:
    """The highest memory so far no longer counts; Linux alone can do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as failure:
        raise KifError(f"peak memory cannot be measured here: {failure}") from None


def peak() -> float:
    """The highest resident memory since `forget_peak`, the model's own in it, in GB."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9
