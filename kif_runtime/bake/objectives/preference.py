"""Objectives of preferences: DPO and its relatives.

Losses are of *gains* [B], log π(y | x) − log π_ref(y | x) summed over the completion. π_ref is the model with the
adapter disabled, so at a fresh adapter's start every gain is 0, and DPO and NPO are at log 2 times their scale.
y⁻ is the forget text's completion, y⁺ the alternative one.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import Step
from .rows import KL, RowObjective, alternative, gain, student_logits
from .tokens import mean_log_prob


class Dpo(RowObjective):
    """(2/β) · DPO with what the capsule makes the model say as y⁺."""

    name = "dpo"
    alternatives = "teacher"

    def __init__(self, beta: float = 0.1, retain: float = 1.0, held: str = KL) -> None:
        super().__init__(retain, held)
        self.beta = beta

    def forget(self, step: Step) -> Tensor:
        chosen = gain(step, alternative(step.forget))
        return dpo(chosen, gain(step, step.forget), self.beta) * (2 / self.beta)


class IdkDpo(Dpo):
    """With a refusal as y⁺. Source: TOFU (arXiv 2401.06121), scaled as in arXiv 2404.05868."""

    name = "idk-dpo"
    alternatives = "refusal"


class AltPo(Dpo):
    """With another answer of the model's own as y⁺. Source: arXiv 2409.13474, where the model is asked for plausible
    alternatives in its prompt, and DPO has the scale 2/β.
    """

    name = "altpo"
    alternatives = "own"


class Npo(RowObjective):
    """DPO without y⁺. Source: arXiv 2404.05868, β = 0.1."""

    name = "npo"

    def __init__(self, beta: float = 0.1, retain: float = 1.0, held: str = KL) -> None:
        super().__init__(retain, held)
        self.beta = beta

    def forget(self, step: Step) -> Tensor:
        return npo(gain(step, step.forget), self.beta)


class SimNpo(RowObjective):
    """NPO without reference, its length divided out. Source: arXiv 2410.07163.

    β = 4.5, γ = 0 and retain text weighing 8 times as much are its published code's for TOFU.
    """

    name = "simnpo"

    def __init__(self, beta: float = 4.5, gamma: float = 0.0, retain: float = 8.0, held: str = KL) -> None:
        super().__init__(retain, held)
        self.beta, self.gamma = beta, gamma

    def forget(self, step: Step) -> Tensor:
        logits = student_logits(step, step.forget)
        return simnpo(mean_log_prob(logits, step.forget.ids, step.forget.completion), self.beta, self.gamma)


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """−log σ(β (gain of y⁺ − gain of y⁻)) [B]. Source: arXiv 2305.18290, eq. 7.

    Unlearning multiplies it by 2/β, so that it compares with a retain loss whatever β is.
    """
    return -logsigmoid(beta * (chosen - rejected))


def npo(gain: Tensor, beta: float = 0.1) -> Tensor:
    """−(2/β) log σ(−β gain) [B].

    As β → 0 it becomes gain plus a constant, that is gradient ascent; larger β stops sooner.
    """
    return -logsigmoid(-beta * gain) * (2 / beta)


def simnpo(mean: Tensor, beta: float, gamma: float) -> Tensor:
    """−(2/β) log σ(−β · mean − γ) [B], mean = log π(y | x) ÷ |y|."""
    return -logsigmoid(-beta * mean - gamma) * (2 / beta)
