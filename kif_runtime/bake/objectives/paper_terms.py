"""Terms of the published distillation (arXiv 2601.10566) that no other objective has."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .tokens import over_completion, wide


def unlikelihood(logits: Tensor, ids: Tensor, completion: Tensor) -> Tensor:
    """L_UL: −mean log(1 − p(y⁻_t)) [B] over the completion. logits [B, T, V]."""
    before = logits[:, :-1]
    said = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, ids[:, 1:, None], True)
    return over_completion(-_log_others(before, said), completion)


def name_unlikelihood(logits: Tensor, names: Tensor, completion: Tensor) -> Tensor:
    """L_NTUL: −mean log(1 − Σ p(w)) [B] over the completion; names [V] or [B, 1, V], True at the name's tokens w."""
    return over_completion(-_log_others(logits[:, :-1], names), completion)


def _log_others(logits: Tensor, excluded: Tensor) -> Tensor:
    """log Σ p(w) over the tokens w that are not excluded, [...]; exact where 1 − p would round to 0.

    logits [..., V]; excluded, a mask that broadcasts to it.
    """
    z = wide(logits)
    return z.masked_fill(excluded, float("-inf")).logsumexp(-1) - z.logsumexp(-1)


def fisher(losses: Iterable[Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diagonal empirical Fisher: the mean over texts of the squared gradient of a text's loss.

    losses: one scalar for each benign text, made one at a time. At a fresh adapter's start, where B = 0, the gradient
    of A is 0 and so is its Fisher: only B is held.
    """
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    count = 0
    for loss in losses:
        count += 1
        slopes = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for square, slope in zip(total.values(), slopes, strict=True):
            if slope is not None:
                square += slope.detach().float().square()
    return {name: square / max(count, 1) for name, square in total.items()}


def ewc(parameters: Mapping[str, Tensor], start: Mapping[str, Tensor], importance: Mapping[str, Tensor]) -> Tensor:
    """L_EWC: Σ F (θ − θ₀)² []. Source of the penalty: arXiv 1612.00796, eq. 3, without its ½ λ."""
    each = [(importance[name] * (p.float() - start[name].float()).square()).sum() for name, p in parameters.items()]
    return torch.stack(each).sum()
