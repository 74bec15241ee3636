"""Means with intervals over subjects, and one table row for a list of values."""

from collections.abc import Hashable, Sequence
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


def summary(values: Sequence[float], groups: Sequence[Hashable], *, beyond: float = 0.2) -> dict[str, Any]:
    """Count, mean and share of |value| over `beyond`, both with 95 % intervals over groups; only counts where empty."""
    result: dict[str, Any] = {"facts": len(values), "subjects": len(set(groups))}
    if values:
        far = [float(abs(value) > beyond) for value in values]
        result |= {
            "mean": float(np.mean(values)),
            "interval": bootstrap(values, groups),
            "beyond": float(np.mean(far)),
            "beyond_interval": bootstrap(far, groups),
        }
    return result
