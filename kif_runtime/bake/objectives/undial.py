"""UNDIAL: the model is its own teacher, with the forget tokens' logits lowered.

Source: arXiv 2402.10052; β between 3 and 30 in its authors' notes, 10 by default. Theirs has no retain text.
"""

import torch
from torch import Tensor

from .base import Step
from .rows import KL, RowObjective, reference_logits, student_logits
from .tokens import over_completion, wide


class Undial(RowObjective):
    """Cross-entropy with the lowered targets; `retain` text is left out by default, as in the source."""

    name = "undial"

    def __init__(self, beta: float = 10.0, retain: float = 0.0, held: str = KL) -> None:
        super().__init__(retain, held)
        self.beta = beta

    def forget(self, step: Step) -> Tensor:
        batch = step.forget
        reference = reference_logits(step, batch)
        return undial(student_logits(step, batch), reference, batch.ids, batch.completion, self.beta)


def lowered(reference: Tensor, ids: Tensor, beta: float) -> Tensor:
    """Target distribution softmax(z_ref − β · onehot(next token)) [B, T − 1, V] of reference logits [B, T, V]."""
    logits = wide(reference[:, :-1])
    spoken = ids[:, 1:, None]
    return logits.scatter_add(-1, spoken, torch.full_like(spoken, -beta, dtype=logits.dtype)).softmax(-1)


def undial(logits: Tensor, reference: Tensor, ids: Tensor, completion: Tensor, beta: float) -> Tensor:
    """Cross-entropy [B] of the student with the lowered targets, the mean over the completion's tokens.

    logits, reference [B, T, V]. The published code counts prompt and padding, too; here the completion is unlearned.
    """
    goal = lowered(reference, ids, beta)
    return over_completion(-(goal * wide(logits[:, :-1]).log_softmax(-1)).sum(-1), completion)
