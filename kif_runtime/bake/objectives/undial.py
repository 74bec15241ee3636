"""UNDIAL: the model is its own teacher, with the forget tokens' logits lowered.

Source: arXiv 2402.10052; β between 3 and 30 in its authors' notes, 10 by default. Theirs is used without retain text.
"""

import torch
from torch import Tensor

from .tokens import over_completion, wide


def lowered(reference: Tensor, ids: Tensor, beta: float) -> Tensor:
    """Target distribution softmax(z_ref − β · onehot(next token)) [B, T − 1, V] of reference logits [B, T, V]."""
    logits = wide(reference[:, :-1])
    spoken = ids[:, 1:, None]
    return logits.scatter_add(-1, spoken, torch.full_like(spoken, -beta, dtype=logits.dtype)).softmax(-1)


def undial(logits: Tensor, reference: Tensor, ids: Tensor, completion: Tensor, beta: float = 10.0) -> Tensor:
    """Cross-entropy [B] of the student with the lowered targets, the mean over the completion's tokens.

    The published code counts prompt and padding too; here only the answer is unlearned. logits, reference [B, T, V].
    """
    goal = lowered(reference, ids, beta)
    return over_completion(-(goal * wide(logits[:, :-1]).log_softmax(-1)).sum(-1), completion)
