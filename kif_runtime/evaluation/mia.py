"""Membership inference: can one tell that a text was in training? Scores are loss-like: lower for what was seen.

Sources: Yeom et al. (arXiv 1709.01604) LOSS; Carlini et al. (arXiv 2012.07805) zlib and reference; Shi et al.
(arXiv 2310.16789) Min-k; Zhang et al. (arXiv 2404.02936) Min-k++; Wang et al. (arXiv 2402.17012) GradNorm. Conventions
(k, what the end token counts in, the sign of AUC) are open-unlearning's.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from scipy.stats import rankdata

from ..errors import KifError
from .answers import Scored

K = 0.4
TINY = 1e-10


def loss(scored: Scored) -> float:
    """ℓ, the end token included."""
    return scored.loss


def zlib_score(scored: Scored, text: str) -> float:
    """ℓ over the bytes of the zlib-compressed answer."""
    return scored.loss / len(zlib.compress(text.encode("utf-8")))


def min_k(scored: Scored, k: float = K) -> float:
    """−mean of the lowest share `k` of log p, at least one token; the end token left out."""
    return _lowest(scored.words.logp, k)


def min_k_plus_plus(scored: Scored, k: float = K) -> float:
    """The same of (log p − μ)/σ, with mean and deviation of log p over the vocabulary."""
    words = scored.words
    return _lowest((words.logp - words.mean) / words.deviation, k)


def _lowest(values: torch.Tensor, k: float) -> float:
    count = max(1, int(len(values) * k))
    return -float(values.double().sort().values[:count].mean())


def reference_score(scored: Scored, reference: Scored) -> float:
    """ℓ − ℓ_ref."""
    return scored.loss - reference.loss


def gradient_norms(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], end: int | None = None, p: float = 2.0
) -> list[float]:
    """Per (prompt, answer) of token ids: the mean over parameter tensors of the p-norm of the gradient of ℓ, the end
    token left out. Parameters, their gradients and their flags stay as they were."""
    found = []
    device = next(model.parameters()).device
    with _gradients(model) as parameters:
        for prompt, answer in pairs:
            wanted = list(answer[:-1] if end is not None and answer[-1] == end else answer)
            ids = torch.tensor([[*prompt, *wanted]], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            value = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :])
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            norms = [torch.linalg.vector_norm(g.float(), p) for g in gradients if g is not None]
            found.append(float(torch.stack(norms).mean()))
    return found


@contextmanager
def _gradients(model: Any) -> Iterator[list[torch.nn.Parameter]]:
    """Every floating-point parameter asks for a gradient inside the block."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    asked = [p.requires_grad for p in parameters]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield parameters
    finally:
        for parameter, before in zip(parameters, asked, strict=True):
            parameter.requires_grad_(before)


def auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    """The probability that a forget score is lower than a holdout score, ties half: 1 means that what should be
    forgotten is plainly still a member, 0.5 that nothing can be told. Raises KifError where either is empty."""
    if not len(forget) or not len(holdout):
        raise KifError("membership is judged against a holdout; one of the two lists is empty")
    n, m = len(forget), len(holdout)
    ranks = rankdata([*forget, *holdout])
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


def priv_leak(found: float, reference: float = 0.5) -> float:
    """((1 − AUC) − (1 − AUC_ref)) / (1 − AUC_ref + 1e-10) · 100, of Min-40 % AUCs. 0 is ideal, below it is still a
    member, above it stands out as forgotten."""
    return ((1 - found) - (1 - reference)) / (1 - reference + TINY) * 100


def relative_difference(found: float, reference: float = 0.5) -> float:
    """(AUC − AUC_ref) / (AUC_ref + 1e-10) · 100."""
    return (found - reference) / (reference + TINY) * 100
