"""Objectives that have a loss for every forget row, and the retain term that they share."""

from torch import Tensor

from ...errors import BakingError
from ..examples import Batch
from ..passes import Output
from ..settings import Settings
from .base import Objective, Step
from .tokens import kl, mean_log_prob, sequence_log_prob

KL, NLL = "kl", "nll"


class RowObjective(Objective):
    """mean of `forget` + retain · mean of the retain rows' loss.

    retain: weight of that term; 0 leaves it out, with its passes. held: how retain text is held. `kl` is the divergence
    from the untouched model and 0, with gradient 0, at a fresh adapter's start; `nll` is the usual training loss on it,
    as most of the sources have it.
    """

    validated_at = None

    def __init__(self, retain: float = 1.0, held: str = KL) -> None:
        if held not in (KL, NLL):
            raise BakingError(f"held={held!r} is not a way to hold retain text; choose {KL!r} or {NLL!r}")
        self.retain, self.held = retain, held

    def settings(self, last_site: int, blocks: int) -> Settings:
        return Settings(learning_rate=3e-4, steps=60)

    def forget(self, step: Step) -> Tensor:
        """Loss [B] of each forget row."""
        raise NotImplementedError

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = {"forget": self.forget(step).mean()}
        if self.retain:
            terms["retain"] = self.retain * held_rows(step, self.held).mean()
        return terms


def held_rows(step: Step, held: str = KL) -> Tensor:
    """Loss [B] of each retain row, over its completion."""
    batch = step.retain
    logits = student_logits(step, batch)
    if held == NLL:
        return -mean_log_prob(logits, batch.ids, batch.completion)
    return kl(reference_logits(step, batch), logits, batch.completion)


def gain(step: Step, batch: Batch) -> Tensor:
    """log π(y | x) − log π_ref(y | x) [B]."""
    own = sequence_log_prob(student_logits(step, batch), batch.ids, batch.completion)
    return own - sequence_log_prob(reference_logits(step, batch), batch.ids, batch.completion)


def student_logits(step: Step, batch: Batch) -> Tensor:
    """[B, T, V]."""
    return spoken(step.student(batch, logits=True))


def reference_logits(step: Step, batch: Batch) -> Tensor:
    """[B, T, V], without gradient."""
    return spoken(step.reference(batch, logits=True))


def spoken(output: Output) -> Tensor:
    """The logits of an output that was asked for them."""
    assert output.logits is not None
    return output.logits


def alternative(batch: Batch) -> Batch:
    """The same prompts with the other completions. Raises BakingError where the examples have none."""
    if batch.alternative is None:
        raise BakingError("this objective prefers one completion to another, and the forget examples have only one")
    return batch.alternative
