"""The default objective: the adapter does what the capsules do, where they do it."""

from typing import Any

from torch import Tensor

from ..adapter import copied, put_back
from ..homes import last_home
from ..neurons import compilable, compile_capsules
from ..settings import MLP, Settings
from ..validation import distances, states
from .base import Objective, Setup, Step

_SOME, _HELPFUL = 16, 0.8  # so many examples tell whether the neurons help: at most so much may be left
_LEAST_FAR = 0.1  # where the teacher does nothing, there is nothing to divide by; one moved token is about 1.5


class CapsuleObjective(Objective):
    """Match the teacher's states on forget text, the model's own on retain text.

    With n(h) = h / rms(h), as later blocks see a state, and d(a, b) = Σ_t mean_D (n(a_t) − n(b_t))²:

        forget = mean_rows d(student, teacher) ÷ d(reference, teacher)        1 where nothing is forgotten
        retain = λ · mean_rows d(student, reference)                           a wholly changed token adds 2 λ

    averaged over the matched blocks. Only the blocks up to the last matched one run; there is no vocabulary head.

    beyond: how many blocks after the last home, or the last site, are matched too. retain: λ. start: whether training
    starts from neurons (see `neurons.py`) or from an adapter that does nothing.

    Once it is prepared, `neurons` is 0 where signatures cannot be written as such, or that does not help.
    """

    name = "capsule"
    completions = False
    validated_at = "states"

    def __init__(self, beyond: int = 0, retain: float = 4.0, start: bool = True) -> None:
        self.beyond, self.retain, self.start = beyond, retain, start
        self.writes_neurons = start
        self.home: int | None = None  # the last block that a signature may be written into

    def settings(self, last_site: int, blocks: int) -> Settings:
        """Small steps from neurons that work already, larger and more from an adapter that does nothing."""
        rate, steps = (3e-5, 40) if self.start and self.neurons != 0 else (2e-3, 100)
        return Settings(
            blocks=last_site + 1, targets=(MLP,), learning_rate=rate, steps=steps, retain_rows=16, validate_every=10,
            enough=0.25,
        )  # fmt: skip

    def prepare(self, setup: Setup) -> None:
        """Start from neurons that do the signatures' work, where the model's MLPs are gated and it helps: some models
        norm or scale what their MLPs add."""
        self.home = None
        if not self.start:
            return
        if not compilable(setup.passes, setup.homes):
            self.neurons = 0
            return
        self.home = last_home(setup.homes)
        fresh = copied(setup.adapter)
        self.neurons = compile_capsules(setup.passes, setup.forget, setup.retain, setup.homes, setup.taken)
        forget, retain = (
            setup.forget[:: 1 + len(setup.forget) // _SOME],
            setup.retain[:: 1 + len(setup.retain) // _SOME],
        )
        if states(setup.passes, forget, retain, self.home)["forget"] > _HELPFUL:
            put_back(setup.adapter, fresh)
            self.neurons = 0

    def loss(self, step: Step) -> dict[str, Tensor]:
        first = step.passes.sites[-1] if self.home is None else self.home
        matched = range(first, min(first + self.beyond + 1, len(step.passes.blocks)))
        goal, was = step.teacher(step.forget, hidden=matched), step.reference(step.forget, hidden=matched)
        own = step.reference(step.retain, hidden=matched)
        forgetting, keeping = step.student(step.forget, hidden=matched), step.student(step.retain, hidden=matched)
        forget: Any = 0
        retain: Any = 0
        for block in matched:
            far = distances(was, goal, step.forget, block).clamp_min(_LEAST_FAR)
            forget = forget + (distances(forgetting, goal, step.forget, block) / far).mean() / len(matched)
            retain = retain + distances(keeping, own, step.retain, block).mean() / len(matched)
        return {"forget": forget, "retain": self.retain * retain}
