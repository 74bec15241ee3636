"""RNA: noise on the reference's retain representation, beside any objective.

Source: arXiv 2501.19202. While the reference (the adapter disabled) reads retain text, δ ~ N(0, ν I) is added to the
output of one block; the student, which sees no noise, is held to what comes out. What a retain question answers then
stands even if a forget token is dropped into it. √ν is given as a share of the states' usual size, which differs
between models and depths; the block is the capsules' last site.

It acts where an objective asks the reference about retain text: not on a retain term that is a plain training loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..examples import Batch
from ..passes import Edit, Output, Passes
from ..settings import Settings
from .base import Objective, Setup, Step
from .untouched import states


class Rna(Objective):
    """`inner` with noise. share: √ν ÷ the median over tokens of the states' root mean square."""

    def __init__(self, inner: Objective, share: float) -> None:
        self.inner, self.share = inner, share
        self.name, self.alternatives, self.completions = inner.name, inner.alternatives, inner.completions
        self.validated_at, self.closed_form = inner.validated_at, inner.closed_form
        self.deviation = 0.0

    def settings(self, last_site: int, blocks: int) -> Settings:
        return self.inner.settings(last_site, blocks)

    def prepare(self, setup: Setup) -> None:
        usual = states(setup.passes, setup.retain, setup.passes.sites[-1]).square().mean(-1).sqrt().median()
        self.deviation = self.share * float(usual)
        self.inner.prepare(setup)
        self.neurons = self.inner.neurons

    def loss(self, step: Step) -> dict[str, Tensor]:
        return self.inner.loss(replace(step, passes=Noisy(step.passes, self.deviation, step.generator)))

    def after(self, step: Step) -> None:
        self.inner.after(step)

    def state(self) -> dict[str, Tensor]:
        return self.inner.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.inner.restore(state)

    def report(self) -> dict[str, Any]:
        return {**self.inner.report(), "rna": self.share, "rna_deviation": self.deviation}

    def token_rows(self) -> dict[int, Tensor]:
        return self.inner.token_rows()


class Noisy(Passes):
    """`passes`, whose reference reads retain text with noise after the capsules' last site."""

    def __init__(self, passes: Passes, deviation: float, generator: torch.Generator) -> None:
        self.__dict__.update(passes.__dict__)
        self._deviation, self._generator = deviation, generator

    def reference(
        self, batch: Batch, *, hidden: Sequence[int] = (), logits: bool = False, edits: Mapping[int, Edit] | None = None
    ) -> Output:
        made = dict(edits or {})
        if bool((batch.subject < 0).all()):
            site = self.sites[-1]
            before = made.get(site, lambda x: x)
            made[site] = lambda x: noisy(before(x), self._deviation, self._generator)
        return super().reference(batch, hidden=hidden, logits=logits, edits=made)


def noisy(states: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """states + δ, drawn on the CPU in fp32, so that a seed means the same on every device."""
    drawn = torch.randn(states.shape, generator=generator) * deviation
    return states + drawn.to(states.device, states.dtype)
