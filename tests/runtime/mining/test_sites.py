"""Candidate sites: what validation must find whatever the model, which one is best, and what is refused."""

import pytest

from kif_runtime import MiningError
from kif_runtime.mining import SiteScore, best_site, validate_sites
from tests.mining import check_unchanged, snapshot


@pytest.fixture(scope="module")
def scores(tiny):
    before, told = snapshot(tiny.model), []
    found = validate_sites(tiny.model, tiny.tokenizer, [0, 3], steps=8, progress=lambda *now: told.append(now))
    check_unchanged(tiny.model, before)
    steps = [(done, total) for done, total, what in told if what == "validating sites"]
    assert steps == [(done, 16) for done in range(1, 17)]
    return {s.site: s for s in found}


@pytest.mark.slow
def test_nothing_that_is_said_after_the_last_block_reaches_later_tokens(scores):
    assert scores[3].left == pytest.approx(scores[3].before, abs=1e-5)
    assert scores[3].harm == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_a_direction_set_below_other_blocks_moves_answers_towards_the_prior_and_bystanders_away(scores):
    assert scores[0].before == scores[3].before > 0.15
    assert scores[0].left < scores[0].before - 5e-4  # random weights make little of a name
    assert scores[0].harm > 5e-5


@pytest.mark.slow
def test_names_are_told_apart_where_the_model_reads_them(scores):
    assert scores[0].recall > 0.5


def test_the_best_site_loses_least_among_those_that_tell_names_apart():
    blurred, good, harmful = (
        SiteScore(1, 1.0, 0.1, 0.0, 0.8),
        SiteScore(3, 1.0, 0.2, 0.1, 1.0),
        SiteScore(5, 1.0, 0.1, 0.4, 0.99),
    )
    assert best_site([blurred, good, harmful]) is good
    assert best_site([blurred, SiteScore(2, 1.0, 0.0, 0.0, 0.3)]) is blurred
    assert (good.kept, harmful.loss) == (0.2, 0.5)


@pytest.mark.parametrize(("sites", "steps", "told"), [([4], 8, "site 4"), ([-1], 8, "site -1"), ([0], 0, "0 steps")])
def test_what_cannot_be_tried_is_refused(tiny, sites, steps, told):
    with pytest.raises(MiningError, match=told):
        validate_sites(tiny.model, tiny.tokenizer, sites, steps=steps)
