"""What the losses are made of: log-probabilities of given tokens, per sample.

Letters: B samples, T positions, V vocabulary. `ids` [B, T] are the tokens of a right- or left-padded batch;
`completion` [B, T] is True at the tokens that a loss is about (an answer, not its prompt, not padding). The token at
position t is predicted by the logits at t − 1, so position 0 is never scored. Computed in fp32, or float64 if given.
"""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """log p(ids[:, t + 1] | ids[:, : t + 1]) [B, T − 1] from logits [B, T, V]."""
    before = wide(logits[:, :-1])
    return before.gather(-1, ids[:, 1:, None])[..., 0] - before.logsumexp(-1)


def over_completion(values: Tensor, completion: Tensor) -> Tensor:
    """Mean [B] of values [B, T − 1], which belong to the tokens from position 1 on; 0 for a row without completion."""
    counted = completion[:, 1:].to(values.dtype)
    return (values * counted).sum(1) / counted.sum(1).clamp_min(1)


def sequence_log_prob(logits: Tensor, ids: Tensor, completion: Tensor) -> Tensor:
    """log π(y | x) [B]: the sum over the completion's tokens."""
    return (token_log_probs(logits, ids) * completion[:, 1:]).sum(1)


def mean_log_prob(logits: Tensor, ids: Tensor, completion: Tensor) -> Tensor:
    """log π(y | x) ÷ |y| [B]; its negative is the usual training loss of each sample."""
    return over_completion(token_log_probs(logits, ids), completion)


def kl(reference: Tensor, logits: Tensor, completion: Tensor) -> Tensor:
    """KL(reference ‖ student) [B] in nats of the predictions of the completion's tokens, their mean.

    Both are logits [B, T, V]. 0, with gradient 0, where they are equal.
    """
    goal = wide(reference[:, :-1]).log_softmax(-1)
    return over_completion((goal.exp() * (goal - wide(logits[:, :-1]).log_softmax(-1))).sum(-1), completion)
