"""Losses of preferences: DPO and its relatives, on sequence log-probabilities.

Each takes *gains* [B], log π(y | x) − log π_ref(y | x) summed over the completion (`sequence_log_prob`), and gives a
loss [B]. π_ref is the model with the adapter disabled, so at a fresh adapter's start every gain is 0, and DPO and NPO
are at log 2 times their scale.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """−log σ(β (gain of y⁺ − gain of y⁻)) [B]. Source: arXiv 2305.18290, eq. 7."""
    return -logsigmoid(beta * (chosen - rejected))


def scaled_dpo(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """(2/β) · DPO [B], the form in which unlearning uses it: the scale makes it comparable with a retain loss.

    y⁻ is the forget text's own answer. IdkDPO takes a refusal as y⁺ (TOFU, arXiv 2401.06121; scale as in arXiv
    2404.05868); AltPO takes plausible other answers (arXiv 2409.13474), which there come from the model, asked for them
    in its prompt.
    """
    return dpo(chosen, rejected, beta) * (2 / beta)


def npo(gain: Tensor, beta: float = 0.1) -> Tensor:
    """−(2/β) log σ(−β gain) [B]: DPO without y⁺. Source: arXiv 2404.05868.

    As β → 0 it becomes 2/β·log 2 + gain, that is gradient ascent; larger β stops sooner.
    """
    return -logsigmoid(-beta * gain) * (2 / beta)


def simnpo(mean: Tensor, beta: float = 2.5, gamma: float = 0.0) -> Tensor:
    """−(2/β) log σ(−β · mean − γ) [B], `mean` = log π(y | x) ÷ |y|. Source: arXiv 2410.07163.

    No reference; the length is divided out. β 2.5 and γ 0 were found best on TOFU forget05 there.
    """
    return -logsigmoid(-beta * mean - gamma) * (2 / beta)
