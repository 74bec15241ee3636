"""What a signature's stored calibration says about other thresholds. Plain numbers, no tensors.

A calibration is the JSON table that mining stores with each signature:
    asked, measured   false fires per token: asked for, and counted on the negatives, or read off their tail if that is
                      more; the detector has seen these negatives, so that on others it is a few times as much
    tokens            how many negatives
    recall            share of held-out positives that fire; the threshold is set under most of them
    tail              {"threshold": u, "rate": share of negatives over u, "shape": ξ, "scale": β}: generalised Pareto
    positives         up to 33 evenly spaced quantiles of the held-out positives' scores, sorted
Scores have the bias included, so the stored decision is at 0. Raising the decision to `shift` is lowering the bias by
it. Method: peaks over threshold (Pickands 1975; Coles, An Introduction to Statistical Modeling of Extreme Values, ch.
4).
"""

from bisect import bisect_right
from collections.abc import Mapping
from math import exp, expm1, inf, isfinite, log, log1p
from typing import Any

from .errors import CapsuleError

# Below this |ξ| the tail is taken as exponential; the difference is far under what a fit can tell.
_FLAT = 1e-9
_LARGEST_EXPONENT = 700.0


def tail_rate(tail: Mapping[str, float], score: float) -> float:
    """Share of negatives, per token, that score over `score`.

    Below the tail's threshold the tail says nothing and the safe bound 1.0 is given. Raises CapsuleError for a
    malformed tail.
    """
    threshold, rate, shape, scale = _parameters(tail)
    excess = (score - threshold) / scale
    if excess < 0:
        return 1.0
    if abs(shape) < _FLAT:
        return rate * exp(-excess)
    if shape * excess <= -1.0:  # past the end of a bounded tail
        return 0.0
    return rate * exp(-log1p(shape * excess) / shape)


def tail_score(tail: Mapping[str, float], rate: float) -> float:
    """The lowest score over which the tail is known to hold at most `rate` of the negatives, a rate over 0."""
    threshold, share, shape, scale = _parameters(tail)
    if not rate > 0:
        raise CapsuleError(f"a false-fire rate of {rate} cannot be reached; ask for a rate over 0")
    if rate >= share:
        return threshold
    steps = log(share / rate)
    if shape * steps > _LARGEST_EXPONENT:
        raise CapsuleError(
            f"its calibration tail is too heavy for a false-fire rate of {rate:g}; ask for a higher rate"
        )
    return threshold + scale * (steps if abs(shape) < _FLAT else expm1(shape * steps) / shape)


def shift_for_rate(calibration: Mapping[str, Any], rate: float) -> float:
    """How much the bias must fall, at least 0, so that at most `rate` of the negatives fire per token."""
    if "tail" not in calibration:
        raise CapsuleError(
            "it has no calibration tail, so its false-fire rate cannot be changed; mine the subject again"
        )
    return max(0.0, tail_score(calibration["tail"], rate))


def recall_at(calibration: Mapping[str, Any], shift: float) -> float | None:
    """Share of held-out positives that still fire with the bias lowered by `shift`; None where no positives are stored.

    The stored quantiles are joined by straight lines; a score that equals `shift` does not fire.
    """
    scores = calibration.get("positives") or []
    count = len(scores)
    if count == 0:
        return None
    below = bisect_right(scores, shift)  # this many do not fire
    if below in (0, count):
        return float(below == 0)
    left, right = scores[below - 1], scores[below]
    return 1.0 - (below - 1 + (shift - left) / (right - left)) / (count - 1)


def _parameters(tail: Mapping[str, float]) -> tuple[float, float, float, float]:
    try:
        threshold, rate, shape, scale = (float(tail[name]) for name in ("threshold", "rate", "shape", "scale"))
    except (KeyError, TypeError, ValueError) as problem:
        raise CapsuleError(f"its calibration tail is malformed ({problem}); mine the subject again") from None
    if not (all(map(isfinite, (threshold, shape, scale))) and 0 <= rate <= 1 and 0 < scale < inf):
        raise CapsuleError(
            "its calibration tail has a rate outside [0, 1] or a scale that is not over 0; mine the subject again"
        )
    return threshold, rate, shape, scale
