"""Gradient ascent and gradient difference, the oldest baselines.

Source: TOFU (arXiv 2401.06121). Their loss is the mean over all tokens of a batch; here every row weighs the same, so
that a step means the same however its rows are split.
"""

from torch import Tensor

from .base import Step
from .rows import RowObjective, student_logits
from .tokens import mean_log_prob


class GradientDifference(RowObjective):
    """log π(y | x) ÷ |y| is made small on forget text, and retain text held (by `nll` in the source)."""

    name = "gradient-difference"

    def forget(self, step: Step) -> Tensor:
        return mean_log_prob(student_logits(step, step.forget), step.forget.ids, step.forget.completion)


class GradientAscent(GradientDifference):
    """The same and nothing retained. It has no lower bound."""

    name = "gradient-ascent"

    def __init__(self) -> None:
        super().__init__(retain=0.0)
