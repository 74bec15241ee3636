"""Tail and recall arithmetic against scipy's generalised Pareto and against counting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import genpareto

from kif_runtime.calibration import recall_at, shift_for_rate, tail_rate, tail_score
from kif_runtime.errors import CapsuleError

SHAPES = [-0.4, -1e-12, 0.0, 1e-6, 0.15, 0.8]


def tail(shape: float, threshold: float = -1.5, rate: float = 0.01, scale: float = 0.3) -> dict[str, float]:
    return {"threshold": threshold, "rate": rate, "shape": shape, "scale": scale}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rate_is_the_generalised_pareto_survival(shape) -> None:
    for score in np.linspace(-1.5, 3, 40):
        expected = 0.01 * genpareto.sf(score, shape, loc=-1.5, scale=0.3)
        assert tail_rate(tail(shape), score) == pytest.approx(expected, rel=1e-5, abs=1e-300)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rate", [0.009, 1e-4, 1e-6, 1e-9])
def test_the_shift_is_the_generalised_pareto_quantile(shape, rate) -> None:
    expected = genpareto.isf(rate / 0.01, shape, loc=-1.5, scale=0.3)
    assert tail_score(tail(shape), rate) == pytest.approx(expected, rel=1e-5)
    assert shift_for_rate({"tail": tail(shape)}, rate) == pytest.approx(max(0.0, expected), rel=1e-5)


@given(
    shape=st.floats(-0.9, 0.9),
    threshold=st.floats(-5, 1),
    rate=st.floats(1e-6, 0.1),
    scale=st.floats(1e-3, 10),
    asked=st.floats(1e-9, 1),
)
def test_a_shifted_signature_fires_at_most_as_often_as_asked(shape, threshold, rate, scale, asked) -> None:
    t = tail(shape, threshold, rate, scale)
    shift = shift_for_rate({"tail": t}, asked)
    assert shift >= 0
    assert tail_rate(t, max(shift, threshold)) <= asked * (1 + 1e-6) + 1e-15
    if shift > 0 and asked < rate:
        assert tail_rate(t, shift) == pytest.approx(asked, rel=1e-4, abs=1e-15)


def test_under_the_tail_and_past_its_end_the_safe_bounds_are_given() -> None:
    assert tail_rate(tail(0.1), -1.6) == 1.0
    assert tail_rate(tail(-0.5), 0.0) == 0.0  # this tail ends at -0.9


def test_recall_counts_the_positives_that_still_fire() -> None:
    scores = np.sort(np.random.default_rng(0).normal(1.0, 0.7, 4000))
    calibration = {"positives": list(np.quantile(scores, np.linspace(0, 1, 33)))}
    for shift in (0.0, 0.5, 1.0, 2.2):
        assert recall_at(calibration, shift) == pytest.approx((scores > shift).mean(), abs=0.006)
    assert recall_at(calibration, scores[0] - 0.01) == 1.0
    assert recall_at(calibration, scores[-1]) == 0.0


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=33), st.floats(-11, 11), st.floats(-11, 11))
def test_recall_is_a_share_and_never_grows_with_the_shift(positives, a, b) -> None:
    calibration = {"positives": sorted(positives)}
    low, high = (recall_at(calibration, shift) for shift in sorted((a, b)))
    assert 0.0 <= high <= low <= 1.0


def test_without_positives_the_recall_is_unknown() -> None:
    assert recall_at({}, 0.0) is None
    assert recall_at({"positives": []}, 0.0) is None


@pytest.mark.parametrize(
    ("calibration", "rate", "message"),
    [
        ({}, 1e-5, "no calibration tail"),
        ({"tail": {"threshold": 0.0, "rate": 0.1}}, 1e-5, "malformed"),
        ({"tail": tail(0.1) | {"scale": "wide"}}, 1e-5, "malformed"),
        ({"tail": tail(0.1, scale=0.0)}, 1e-5, "scale that is not over 0"),
        ({"tail": tail(0.1, rate=1.5)}, 1e-5, "outside"),
        ({"tail": tail(float("nan"))}, 1e-5, "scale"),
        ({"tail": tail(200.0)}, 1e-5, "too heavy"),
        ({"tail": tail(0.1)}, 0.0, "over 0"),
    ],
)
def test_a_calibration_that_cannot_answer_says_so(calibration, rate, message) -> None:
    with pytest.raises(CapsuleError, match=message):
        shift_for_rate(calibration, rate)
