"""Gradient ascent and gradient difference, the oldest baselines.

Source: TOFU (arXiv 2401.06121). Their loss is the mean over all tokens of a batch; here every sample weighs the
same, so that weights per sample (`egup`) mean the same with every objective.
"""

from torch import Tensor

from .tokens import mean_log_prob


def ascent(logits: Tensor, ids: Tensor, completion: Tensor) -> Tensor:
    """Gradient ascent [B]: log π(y | x) ÷ |y|, to be made small. It has no lower bound."""
    return mean_log_prob(logits, ids, completion)


def descent(logits: Tensor, ids: Tensor, completion: Tensor) -> Tensor:
    """The usual loss [B], on retain text; gradient difference is `ascent` on forget text plus this."""
    return -mean_log_prob(logits, ids, completion)
