"""The training loop: draws rows, averages gradients over parts and processes, checks, logs, stops.

A step's rows are split over processes, and there over parts that fit into memory. As an objective's terms are means
over rows, the average of the parts' gradients is the step's gradient, however it was split.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BakingError
from ..files import reason, shown
from . import checkpoints
from .adapter import copied, put_back
from .examples import FORGET, RETAIN, Example, collate
from .objectives import Objective, Step
from .order import drawn, seeded
from .passes import Passes
from .processes import Processes
from .settings import Settings

Progress = Callable[[int, int, str], None]
Pressure = Callable[[Step], Any]

LOG = "training.jsonl"


@dataclass
class Outcome:
    """steps: how many were taken. best_step: after which one the adapter is from. ratios: of its validation.
    stopped: why, "steps" or "validation"."""

    steps: int = 0
    best_step: int = 0
    ratios: dict[str, float] = field(default_factory=dict)
    stopped: str = "steps"


@dataclass
class Trainer:
    """Trains the adapter of `passes.model` in place.

    folder: where checkpoint and log go. run: what tells this run from another. validate: gives the ratios "forget" (0:
    as with the capsules, 1: nothing forgotten) and "retain" (0: nothing else moved). pressure: for each step, a context
    in which the losses are taken while the model is under attack.
    """

    passes: Passes
    objective: Objective
    forget: Sequence[Example]
    retain: Sequence[Example]
    settings: Settings
    adapter: Mapping[str, nn.Parameter]
    folder: Path
    run: str
    seed: int = 0
    processes: Processes = field(default_factory=Processes)
    validate: Callable[[], dict[str, float]] | None = None
    pressure: Sequence[Pressure] = ()
    progress: Progress | None = None
    parts: int = 1

    def train(self) -> Outcome:
        """From the folder's checkpoint if there is one, else from the start. Ends with the best adapter in place.

        Raises BakingError where a loss is not a finite number: the last good checkpoint stays.
        """
        with torch.random.fork_rng(devices=[]):  # a step seeds the CPU's generator
            return self._train()

    def _train(self) -> Outcome:
        self.processes.check(self.settings)
        self.optimiser = torch.optim.AdamW(
            self.adapter.values(), lr=self.settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.outcome, self.best = Outcome(), dict[str, Tensor]()
        self._resume()
        total = self.settings.steps
        self._tell()
        if self.outcome.steps == 0:
            self._clear_log()
            self._log({"step": 0, "forget": len(self.forget), "retain": len(self.retain)})
            self._validated()
        while self.outcome.steps < total and self.outcome.stopped != "validation":
            self._step(self.outcome.steps)
            self.outcome.steps += 1
            due = self.outcome.steps % self.settings.validate_every == 0 or self.outcome.steps == total
            if due:
                self._validated()
            if due or self.outcome.steps % self.settings.checkpoint_every == 0:
                self._checkpoint()
            self._tell()
        if self.best:
            put_back(self.adapter, self.best)
        return self.outcome

    def _tell(self) -> None:
        if self.progress and self.processes.is_main:
            self.progress(self.outcome.steps, self.settings.steps, "baking")

    def _step(self, number: int) -> None:
        begun = time.perf_counter()
        torch.manual_seed(int(torch.randint(2**62, (), generator=seeded(self.seed, "step", number))))
        self._set_rate(number)
        terms = self._gradients(number)
        norm = nn.utils.clip_grad_norm_(self.adapter.values(), self.settings.clip)
        self._check(terms | {"gradient": norm}, number)
        self.optimiser.step()
        self.objective.after(self.last_part)
        values = {name: round(float(value), 6) for name, value in terms.items()}
        self._log({"step": number, "terms": values, "gradient": round(float(norm), 6),
                   "seconds": round(time.perf_counter() - begun, 3)})  # fmt: skip

    def _set_rate(self, number: int) -> None:
        """Linear warm-up, then linear decay to a tenth."""
        s = self.settings
        rate = s.learning_rate * min(1.0, (number + 1) / max(1, s.warmup)) * (1 - 0.9 * number / s.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def _gradients(self, number: int) -> dict[str, Tensor]:
        """The step's gradients, in place, and its terms. Memory that does not suffice halves the parts' rows."""
        while True:
            try:
                terms = self._own(number)
                short = False
            except (torch.OutOfMemoryError, RuntimeError) as failure:
                if not _is_memory(failure):
                    raise
                terms, short = {}, True
            if not self.processes.any(short):  # all ask before any sums, so that none waits for one that ran short
                return self._summed(terms)
            self.parts *= 2
            self.processes.check(self.settings, self.parts)

    def _own(self, number: int) -> dict[str, Tensor]:
        """This process's share of the step's gradients and terms, part after part."""
        for parameter in self.adapter.values():
            parameter.grad = None
        shares = self.parts * self.processes.count
        sums: dict[str, Tensor] = {}
        for part in range(self.parts):
            step = self.last_part = self._rows(number, self.processes.index * self.parts + part, shares)
            with self._attacked(step):
                terms = self.objective.loss(step)
                torch.stack([*terms.values()]).sum().div(shares).backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach() / shares
        return sums

    def _summed(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same over all processes."""
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.adapter.values()]
        for parameter, grad in zip(self.adapter.values(), self.processes.sum(grads), strict=True):
            parameter.grad = grad
        return dict(zip(sums, self.processes.sum(list(sums.values())), strict=True))

    def _attacked(self, step: Step) -> Any:
        return self.pressure[step.number % len(self.pressure)](step) if self.pressure else nullcontext()

    def _rows(self, number: int, share: int, shares: int) -> Step:
        """The step as share `share` of `shares` sees it."""

        def batch(what: str, examples: Sequence[Example], rows: int) -> Any:
            chosen = drawn(self.seed, what, number, rows, len(examples))[share::shares]
            return collate([examples[i] for i in chosen], chosen).to(self.passes.device)

        return Step(
            self.passes,
            batch(FORGET, self.forget, self.settings.forget_rows),
            batch(RETAIN, self.retain, self.settings.retain_rows),
            number,
            self.settings.steps,
            seeded(self.seed, "objective", number, share),
            self.adapter,
        )

    def _check(self, terms: Mapping[str, Tensor], number: int) -> None:
        bad = [name for name, value in terms.items() if not math.isfinite(float(value))]
        if bad:
            good = f"the last good checkpoint is in {shown(self.folder)}"
            what = "the gradient" if bad == ["gradient"] else f"the loss term {bad[0]!r}"
            raise BakingError(f"{what} is not a finite number at step {number}; lower the learning rate ({good})")

    def _validated(self) -> None:
        """Measure; keep the adapter if it is the best so far; stop where it is good enough."""
        if self.validate is None:
            return
        ratios = self.validate()
        self._log({"step": self.outcome.steps, "validation": {k: round(v, 6) for k, v in ratios.items()}})
        if not all(math.isfinite(v) for v in ratios.values()):
            raise BakingError(
                f"the validation ratio is not a finite number after step {self.outcome.steps}; lower the learning rate "
                f"(the last good checkpoint is in {shown(self.folder)})"
            )
        before = sum(self.outcome.ratios.values()) if self.outcome.ratios else math.inf
        if sum(ratios.values()) < before:
            self.best, self.outcome.best_step, self.outcome.ratios = copied(self.adapter), self.outcome.steps, ratios
        if ratios["forget"] <= self.settings.enough and ratios["retain"] <= self.settings.enough / 4:
            self.outcome.stopped = "validation"

    def _checkpoint(self) -> None:
        if not self.processes.is_main:
            return
        meta = {"best_step": self.outcome.best_step, "ratios": self.outcome.ratios, "stopped": self.outcome.stopped,
                "parts": self.parts}  # fmt: skip
        moments = checkpoints.moments(self.optimiser, self.adapter)
        state = self.objective.state()
        adapter = {name: p.detach() for name, p in self.adapter.items()}
        checkpoints.Checkpoint(self.run, self.outcome.steps, adapter, moments, state, self.best, meta).write(
            self.folder
        )

    def _resume(self) -> None:
        found = checkpoints.read(self.folder, self.run)
        if found is None:
            return
        put_back(self.adapter, found.adapter)
        checkpoints.restore_moments(self.optimiser, self.adapter, found.moments)
        self.objective.restore(found.objective)
        self.best, self.parts = found.best, found.meta["parts"]
        kept = ("best_step", "ratios", "stopped")
        self.outcome = Outcome(found.step, **{name: found.meta[name] for name in kept})

    def _clear_log(self) -> None:
        """What another run, or this one before its first checkpoint, left is none of this one's curves."""
        if self.processes.is_main:
            try:
                (self.folder / LOG).unlink(missing_ok=True)
            except OSError as failure:
                raise BakingError(f"cannot replace {shown(self.folder / LOG)}: {reason(failure)}") from failure

    def _log(self, row: dict[str, Any]) -> None:
        """One line; what a kill cuts off is one line at most."""
        if not self.processes.is_main:
            return
        try:
            handle = os.open(self.folder / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as failure:
            raise BakingError(f"cannot write {shown(self.folder / LOG)}: {reason(failure)}") from failure


def _is_memory(failure: Exception) -> bool:
    return isinstance(failure, torch.OutOfMemoryError) or "allocate memory" in str(failure)
