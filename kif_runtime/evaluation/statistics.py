"""Means, shares and ratios with intervals, and one table row for a list of values."""

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from ..errors import KifError


def bootstrap(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of the mean of `values` when whole groups are drawn anew with replacement.

    groups: the subject of each value (default: each value its own). Facts of one subject stand or fall together, so
    subjects are what is drawn. Deterministic for a seed. With a single group the interval is just its mean. Raises
    KifError for no values, or groups of another number. Source: Efron and Tibshirani, An Introduction to the Bootstrap
    (1993), ch. 13.
    """
    groups = range(len(values)) if groups is None else groups
    if not len(values) or len(groups) != len(values):
        raise KifError(f"an interval needs as many groups as values, and some; got {len(values)} and {len(groups)}")
    names = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    at = np.array([names[group] for group in groups])
    sums = np.bincount(at, weights=np.asarray(values, dtype=float))
    counts = np.bincount(at)
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float]:
    """`bootstrap` over the groups, or over the values where there is a single group, as in an audit of one subject."""
    return bootstrap(values, groups if len(set(groups)) > 1 else None)


def wilson(successes: int, tried: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, which has a width where nothing, or everything, succeeded too.

    Raises KifError for no tries. Source: Wilson (1927), J. Am. Stat. Assoc. 22, 209-212.
    """
    if not 0 <= successes <= tried or tried < 1:
        raise KifError(f"a share needs tries, and no more successes than tries; got {successes} of {tried}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, extra = successes / tried, z * z / tried
    middle = (p + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(p * (1 - p) / tried + extra / (4 * tried))
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == tried else middle + half)


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """{"tried", "success", "interval"} of a list of outcomes; only the count where it is empty."""
    if not hits:
        return {"tried": 0}
    return {"tried": len(hits), "success": sum(hits) / len(hits), "interval": wilson(sum(hits), len(hits))}


def ratio(
    above: Sequence[float], below: Sequence[float], *, level: float = 0.95, resamples: int = 4000, seed: int = 0
) -> dict[str, Any]:
    """mean(above) / mean(below) of values that belong together in pairs, with its percentile interval when pairs are
    drawn anew. `ratio` is None where mean(below) is 0. Raises KifError for no values, or unequal numbers of them."""
    top, bottom = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    if not len(top) or top.shape != bottom.shape:
        raise KifError(f"a ratio needs as many values above as below, and some; got {len(top)} and {len(bottom)}")
    if bottom.mean() <= 0:
        return {"ratio": None, "interval": None}
    drawn = np.random.default_rng(seed).integers(len(top), size=(resamples, len(top)))
    found = top[drawn].sum(1) / np.maximum(bottom[drawn].sum(1), np.finfo(float).tiny)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return {"ratio": float(top.mean() / bottom.mean()), "interval": (float(low), float(high))}


def summary(values: Sequence[float], groups: Sequence[Hashable], *, beyond: float = 0.2) -> dict[str, Any]:
    """Count, mean, share of |value| over `beyond`, and `left`, the mean where values below 0 count as 0 (one far below
    does not make up for another far above), each with its interval; only counts where empty."""
    result: dict[str, Any] = {"facts": len(values), "subjects": len(set(groups))}
    if values:
        far = [float(abs(value) > beyond) for value in values]
        left = [max(0.0, float(value)) for value in values]
        result |= {
            "mean": float(np.mean(values)),
            "interval": interval(values, groups),
            "beyond": float(np.mean(far)),
            "beyond_interval": interval(far, groups),
            "left": float(np.mean(left)),
            "left_interval": interval(left, groups),
        }
    return result
