"""Detectors: Fisher directions against everything else the model reads, and thresholds from the tail of its scores."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from ..calibration import tail_rate, tail_score
from ..capsule import Signature

RIDGE = 0.03
HARD, HARD_ROUNDS = 64, 2
# Where the asked rate would cost recall, up to this many false fires per token are taken instead, and reported.
MOST_FALSE_FIRES = 2e-5
# A heavier tail than this comes from a handful of texts that name the subject in other words, not from chance.
_HEAVIEST = 0.5


@dataclass(frozen=True)
class Detector:
    """Scores w·x̂ + b on RMS-normalised states [.., D]; positive fires. weight [D] and bias are fp32."""

    weight: Tensor
    bias: float

    def scores(self, states: Tensor) -> Tensor:
        return states.float() @ self.weight + self.bias

    def lowered(self, by: float) -> "Detector":
        return Detector(self.weight, self.bias - by)


def gram(states: Tensor, mean: Tensor) -> Tensor:
    """Σ (x − mean)(x − mean)ᵀ [D, D] over the rows of states [N, D]."""
    away = states - mean
    return away.T @ away


def fisher(
    positives: Tensor, mean: Tensor, scatter: Tensor, near: Tensor, negatives: Tensor, near_gram: Tensor | None = None
) -> Detector:
    """w = (S + λI)⁻¹(μ₊ − μ₋), scaled so that the mean negative scores 0 and the mean positive 1.

    positives [P, D], near misses [M, D], negatives [N, D]: RMS-normalised states; mean [D] and scatter [D, D]: those of
    the controls. near_gram: `gram` of the near misses, where it is known already. S adds half the near misses' scatter,
    so that names which share words with the subject stay apart, and in each of HARD_ROUNDS rounds that of the negatives
    the last round scored highest. λ is RIDGE of the mean diagonal. Source: Fisher (1936); shrinkage as in Friedman
    (1989), eq. 18, with a fixed weight.
    """
    gap = positives.mean(0) - mean
    total, count = gram(near, mean) if near_gram is None else near_gram, len(near)

    def solve() -> Detector:
        spread = scatter + 0.5 * total / max(1, count)
        ridge = RIDGE * spread.diagonal().mean()
        weight = torch.linalg.solve(spread + ridge * torch.eye(len(mean)), gap)
        weight = weight / (gap @ weight)
        return Detector(weight.contiguous(), float(-(mean @ weight)))

    detector = solve()
    for _ in range(HARD_ROUNDS):
        hard = negatives[detector.scores(negatives).topk(min(HARD, len(negatives))).indices]
        total, count = total + gram(hard, mean), count + len(hard)
        detector = solve()
    return detector


def fit_tail(scores: Tensor, share: float = 0.002) -> dict[str, float]:
    """Generalised-Pareto tail of the negatives' scores over their (1 − share) quantile, by maximum likelihood.

    At least 30 scores lie in the tail. Source: Coles (2001), ch. 4.
    """
    over = min(len(scores) // 2, max(30, math.ceil(share * len(scores))))
    top = scores.topk(over + 1).values.double()
    threshold = float(top[-1])
    excess = (top[:-1] - threshold).clamp_min(1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        shape, _, scale = stats.genpareto.fit(excess.numpy(), floc=0)
    shape = min(max(float(shape), -0.5), _HEAVIEST)
    return {"threshold": threshold, "rate": over / len(scores), "shape": shape, "scale": max(float(scale), 1e-6)}


@dataclass(frozen=True)
class Decision:
    """A detector with its threshold folded into the bias, and how it was set."""

    detector: Detector
    calibration: dict[str, Any]
    near_rate: float


def decide(
    detector: Detector, held_out: Tensor, negatives: Tensor, near: Tensor, asked: float, up: float = 0.4
) -> Decision:
    """Put the threshold where at most `asked` of the negatives fire, above the near misses where recall allows it.

    Where that floor is over the weakest positive, it falls, down to MOST_FALSE_FIRES.

    From that floor it goes the share `up` of the way to the weakest held-out positive: texts differ more than controls,
    and contexts more than templates. held_out [H, D], negatives [N, D], near [M, D] are RMS-normalised states.
    """
    background, hits = detector.scores(negatives), detector.scores(held_out).sort().values
    tail = fit_tail(background)
    weakest = float(hits[round(0.02 * (len(hits) - 1))])
    floor = tail_score(tail, asked)
    if floor > weakest:
        most = max(asked, MOST_FALSE_FIRES)
        counted = float(background.topk(1 + int(most * len(background))).values[-1])
        floor = max(min(tail_score(tail, most), counted), min(floor, weakest - 0.05))
    close = detector.scores(near) if len(near) else background[:0]
    if len(close):
        floor = max(floor, min(float(close.max()), 0.5 * (floor + weakest)))
    threshold = floor + up * max(0.0, weakest - floor)
    moved = tail | {"threshold": tail["threshold"] - threshold}
    quantiles = torch.quantile(hits.double(), torch.linspace(0, 1, min(33, len(hits))).double()) - threshold
    counted = float((background > threshold).float().mean())
    calibration = {
        "asked": asked,
        "measured": max(counted, tail_rate(moved, 0.0) if moved["threshold"] <= 0 else counted),
        "tokens": len(background),
        "recall": float((hits > threshold).float().mean()),
        "tail": moved,
        "positives": [float(q) for q in quantiles],
    }
    near_rate = float((close > threshold).float().mean()) if len(close) else 0.0
    return Decision(detector.lowered(threshold), calibration, near_rate)


def signature(site: int, role: str, decision: Decision, basis: Tensor, target: Tensor) -> Signature:
    """A hard-gated signature of full strength; basis [r, D] orthonormal, target [r]."""
    return Signature(
        site=site,
        role=role,
        detector=decision.detector.weight.float().contiguous(),
        bias=torch.tensor(decision.detector.bias, dtype=torch.float32),
        basis=basis.float().contiguous(),
        target=target.float().contiguous(),
        strength=torch.tensor(1.0),
        calibration=decision.calibration,
    )


def rank_one(site: int, role: str, decision: Decision, state: Tensor, usual: Tensor) -> Signature:
    """The signature that moves `state` [D] onto `usual` [D]: one row, along their difference."""
    gap = state - usual
    row = (gap / gap.norm().clamp_min(1e-12))[None]
    return signature(site, role, decision, row, row @ usual)


def join(states: Sequence[Tensor], width: int) -> Tensor:
    """Rows of all of `states` in one [N, D]; empty where there are none."""
    return torch.cat(list(states)) if states else torch.empty(0, width)
