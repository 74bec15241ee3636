"""What a model holds inside: probes, similarity, the logit lens, separation. Plain functions on tensors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..blocks import decoder_blocks, unwrapped
from ..errors import KifError

NEIGHBOURS = 5


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of x [N, D] and y [N, E], the same N inputs in two models: 1 the same up to rotation and scale.

    ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) on centred columns, in float64; with fewer inputs than dimensions it lies high. 1 where
    neither varies, 0 where only one does. Source: Kornblith et al. (2019), arXiv 1905.00414, eq. 3.
    """
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    # through the Gram matrices [N, N], which are smaller
    gx, gy = x @ x.T, y @ y.T
    scale = gx.norm() * gy.norm()
    return float((gx * gy).sum() / scale) if scale > 0 else float(gx.norm() == gy.norm())


def neighbour_overlap(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> float:
    """The mean share of each input's k nearest others by cosine that are the same in x [N, D] and y [N, E].

    k is at most N − 1; by chance it is k / (N − 1). Source: the k-NN transfer of arXiv 2503.06991, without labels.
    """
    k = min(k, len(x) - 1)
    near = []
    for z in (x, y):
        unit = torch.nn.functional.normalize(z.double(), dim=1)
        alike = (unit @ unit.T).fill_diagonal_(-torch.inf)
        near.append(alike.topk(k, dim=1).indices.tolist())
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(*near, strict=True)]))


def drift(before: Tensor, after: Tensor) -> Tensor:
    """[N]: 1 − cosine of the states before [N, L, D] and after, mean over blocks."""
    alike = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    return (1 - alike.mean(-1)).clamp_min(0)  # rounding can put a cosine over 1


def cohens_d(x: Sequence[float], y: Sequence[float]) -> float | None:
    """(mean x − mean y) / pooled standard deviation; None for under two values each, or where nothing varies."""
    if len(x) < 2 or len(y) < 2:
        return None
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    pooled = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
    return float((a.mean() - b.mean()) / np.sqrt(pooled)) if pooled > 0 else None


def separation(own: Tensor, others: Tensor, direction: Tensor) -> float | None:
    """Cohen's d of the projections of own [N, D] and others [M, D] on a direction [D]."""
    return cohens_d((own @ direction).tolist(), (others @ direction).tolist())


def identity_probe(
    train: Tensor, test: Tensor, entity: Sequence[int], prompt: Sequence[int], *, strength: float = 1.0
) -> np.ndarray:
    """[N] bool: whether a linear probe names the right entity of each state, on prompts it has not seen.

    train, test: states [N, D] of the same N inputs, of one model or two: the probe learns from `train` on all prompts
    but one and is asked `test` on that one. entity, prompt: which each input is. Multinomial logistic regression on
    features scaled by those of training. Raises KifError without scikit-learn.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise KifError("the probe needs scikit-learn; install it with: pip install 'kif-runtime[audit]'") from None

    x, z, labels, prompts = train.double().numpy(), test.double().numpy(), np.asarray(entity), np.asarray(prompt)
    right = np.zeros(len(labels), dtype=bool)
    for held_out in np.unique(prompts):
        out = prompts == held_out
        scale = StandardScaler().fit(x[~out])
        known, asked = scale.transform(x[~out]), scale.transform(z[out])
        # the solution lies in the span of the inputs, so nothing is lost by looking at them in its coordinates
        span = np.linalg.svd(known, full_matrices=False)[2].T
        probe = LogisticRegression(C=strength, max_iter=300).fit(known @ span, labels[~out])
        right[out] = probe.predict(asked @ span) == labels[out]
    return right


class Lens:
    """The logit lens: what the output head makes of a state that some block gives, through the final norm.

    `fits_to` tells whether that is how the model itself goes from its last block to its logits; where it is not
    (another norm, a projection in between), the lens says nothing. Source: nostalgebraist (2020), "interpreting GPT".
    """

    def __init__(self, model: Any) -> None:
        base = unwrapped(model)
        self._head, self._norm = base.get_output_embeddings(), final_norm(base)

    @torch.inference_mode()
    def log_probs(self, states: Tensor) -> Tensor:
        """[…, V] fp32 of states […, D]."""
        weight = self._head.weight
        x = states.to(weight.device, weight.dtype)
        x = self._norm(x) if self._norm is not None else x
        return self._head(x).float().log_softmax(-1).cpu()

    @staticmethod
    def fits_to(final: Tensor, own: Tensor) -> bool:
        """Whether what it makes of the last states is what the model itself says: log_probs [N, V] both, within 0.05
        where the model gives at least 10⁻⁴."""
        return bool(((final - own).abs() * (own > -9.2)).max() < 0.05)


def final_norm(model: Any) -> Any:
    """The norm between the last block and the head: the first norm that stands after the blocks, beside them."""
    blocks = decoder_blocks(model)
    owner = next(m for m in model.modules() if any(child is blocks for child in m.children()))
    children = list(owner.children())
    after = children[next(i for i, child in enumerate(children) if child is blocks) + 1 :]
    norms = [child for child in after if "norm" in type(child).__name__.lower()]
    return norms[0] if norms else None
