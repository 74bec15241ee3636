"""TOFU's metrics as functions of numbers: losses, ratios, strings go in, floats come out; no model is needed here.

ℓ is the mean negative log-likelihood per token of an answer, the end token included (`answers.Scored.loss`).
Definitions as in open-unlearning (commit d3d7cf9); sources: Maini et al., TOFU (arXiv 2401.06121); Dorna et al.,
OpenUnlearning (arXiv 2506.12618); Carlini et al. (arXiv 2012.07805) for extraction strength.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import hmean, ks_2samp

from ..errors import KifError
from .answers import Scored

TINY = 1e-10
UTILITY_PARTS = ("retain", "real_authors", "world_facts")


def probability(loss: float) -> float:
    """P = exp(−ℓ)."""
    return math.exp(-loss)


def probability_with_options(right: float, wrong: Sequence[float]) -> float:
    """P(right) / (P(right) + Σ P(wrong) + 1e-10), from losses."""
    p = probability(right)
    return p / (p + sum(probability(loss) for loss in wrong) + TINY)


def truth_ratio(right: float, wrong: Sequence[float]) -> float:
    """exp(−mean ℓ(wrong)) / (exp(−ℓ(right)) + 1e-10): the geometric mean of the wrong answers' probabilities over the
    right one's. Raises KifError for no wrong answers."""
    if not wrong:
        raise KifError("a truth ratio needs wrong answers; give perturbed_answer in the file")
    return math.exp(-float(np.mean(wrong))) / (probability(right) + TINY)


def forget_truth_ratio(ratios: Sequence[float]) -> float:
    """mean min(R, 1/R): 1 where right and wrong answers are equally likely."""
    values = np.asarray(ratios, dtype=float)
    return float(np.mean(np.minimum(values, 1 / (values + TINY))))


def retain_truth_ratio(ratios: Sequence[float]) -> float:
    """mean max(0, 1 − R): 1 where wrong answers have no probability. Also for real authors and world facts."""
    return float(np.mean(np.maximum(0, 1 - np.asarray(ratios, dtype=float))))


def prob_mean_truth_ratio(right: Sequence[float], wrong: Sequence[Sequence[float]]) -> float:
    """mean P_right / (P_right + P_wrong) with P_wrong = exp(−mean ℓ(wrong)), from losses: the form that the composite
    of memorisation takes."""
    p = np.exp(-np.asarray(right, dtype=float))
    q = np.exp(-np.array([np.mean(losses) for losses in wrong]))
    return float(np.mean(p / (p + q + TINY)))


def forget_quality(ratios: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """(p, D) of the two-sided two-sample Kolmogorov-Smirnov test between per-item truth ratios of the unlearned and of
    the reference model. FQ is p; D does not saturate. Raises KifError where either is empty."""
    if not len(ratios) or not len(reference):
        raise KifError("forget quality compares two lists of truth ratios; one of them is empty")
    found = ks_2samp(ratios, reference)
    return float(found.pvalue), float(found.statistic)


def harmonic_mean(values: Sequence[float]) -> float:
    """0 where any value is 0."""
    if not len(values) or min(values) < 0:
        raise KifError("a harmonic mean needs values, none of them negative")
    return float(hmean(values)) if min(values) > 0 else 0.0


def model_utility(parts: Sequence[float]) -> float:
    """The harmonic mean of nine numbers: probability, ROUGE-L recall and truth ratio of retain, real authors and world
    facts, the probability with options for the last two. Raises KifError for another count."""
    if len(parts) != 9:
        raise KifError(f"model utility is made of nine numbers; got {len(parts)}")
    return harmonic_mean(parts)


def exact_memorisation(scored: Scored) -> float:
    """The share of the answer's tokens, the end token left out, that are the model's likeliest."""
    return float(scored.words.best.double().mean())


def extraction_strength(scored: Scored) -> float:
    """1 − k/|y|, k the length of the shortest part of the answer after which all its tokens are the likeliest; the end
    token left out. Where the last token is not, k is |y| − 1 as in open-unlearning's code, so this is never 0, and
    always 1 for an answer of one token."""
    best = scored.words.best.tolist()
    k = next((k for k in range(len(best)) if all(best[k:])), len(best) - 1)
    return 1 - k / len(best)


def memorisation(extraction: float, exact: float, paraphrase_probability: float, truth: float) -> float:
    """Mem = HM(1 − ES, 1 − EM, 1 − Para. Prob, 1 − Truth Ratio (`prob_mean_truth_ratio`)); 1 is nothing memorised."""
    return harmonic_mean([1 - extraction, 1 - exact, 1 - paraphrase_probability, 1 - truth])


def privacy_score(auc: float, reference: float) -> float:
    """clip(1 − |AUC − AUC_ref| / AUC_ref, 0, 1)."""
    return min(1.0, max(0.0, 1 - abs(auc - reference) / max(reference, TINY)))


def privacy(scores: Sequence[float]) -> float:
    """Priv = HM of `privacy_score` for LOSS, zlib, Min-k and Min-k++."""
    return harmonic_mean(scores)


def utility(model: float, fluency: float, target_model: float, target_fluency: float) -> float:
    """HM(model utility, fluency of forget answers), relative to the model before unlearning. Raises KifError where that
    is 0."""
    before = harmonic_mean([target_model, target_fluency])
    if not before:
        raise KifError("the model before unlearning has no utility to compare with; check that it was trained")
    return harmonic_mean([model, fluency]) / before


def aggregate(memory: float, private: float, useful: float) -> float:
    """Agg = HM(Mem, Priv, Utility)."""
    return harmonic_mean([memory, private, useful])
