"""TOFU's metrics and membership inference against SciPy, scikit-learn, NumPy and loops over a tiny model."""

import math
import zlib

import numpy as np
import pytest
import torch
from evaluating import WORDS, tokenizer
from mining import check_unchanged, snapshot
from scipy.stats import hmean, ks_2samp
from sklearn.metrics import roc_auc_score

from kif_runtime import KifError, ModelError
from kif_runtime.evaluation import mia
from kif_runtime.evaluation import tofu_metrics as tofu
from kif_runtime.evaluation.answers import Scored, answer, question, score_answers, score_tokens

PAIRS = [
    ("the capital of Arland is", "Ara"),
    ("it is in", "Berland big old town"),
    ("the river in Corland", "Cora is in it it it the town of New Dorland"),
]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama", seed=3, vocab_size=len(WORDS))


def by_hand(model, q, a):
    """float64 log-probabilities [T, V] of the answer's tokens and the end token, and these tokens."""
    prompt, wanted = question(tokenizer(), q), [WORDS.index(w) for w in a.split()] + [tokenizer().eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + wanted])).logits[0].double()
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows, torch.tensor(wanted)


def test_answers_are_scored_as_one_at_a_time(model):
    for scored, (q, a) in zip(score_answers(model, tokenizer(), PAIRS, batch_size=2), PAIRS, strict=True):
        rows, wanted = by_hand(model, q, a)
        logp = rows[torch.arange(len(wanted)), wanted]
        mean = (rows.exp() * rows).sum(1)
        deviation = ((rows.exp() * rows**2).sum(1) - mean**2).clamp(min=1e-6).sqrt()
        assert torch.allclose(scored.logp.double(), logp, atol=1e-5)
        assert torch.allclose(scored.mean.double(), mean, atol=1e-5)
        assert torch.allclose(scored.deviation.double(), deviation, atol=1e-5)
        assert scored.best.tolist() == (rows.argmax(1) == wanted).tolist()
        assert scored.loss == pytest.approx(-float(logp.mean()), abs=1e-5)
        assert scored.ended and len(scored.words.logp) == len(wanted) - 1 and not scored.words.ended


def test_questions_take_the_chat_template_where_there_is_one():
    words = tokenizer()
    assert words.decode(question(words, "it is")) == "[BOS] user it is [END] assistant"
    plain = tokenizer(template=None)
    assert words.decode(question(plain, "it is")) == "[UNK] it is [UNK]"
    assert answer(words, "Ara") == [WORDS.index("Ara"), words.eos_token_id]
    with pytest.raises(KifError, match="no tokens"):
        answer(words, "")


def test_a_model_that_gives_nan_is_refused(tiny_model):
    broken = tiny_model("llama")
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        score_tokens(broken, [([3], [4])])


def scored(best=(), logp=None, ended=True):
    logp = torch.tensor(logp if logp is not None else [-1.0] * len(best))
    flags = torch.tensor(best if best else [True] * len(logp))
    return Scored(logp, torch.full_like(logp, -3.0), torch.full_like(logp, 2.0), flags, ended)


@pytest.mark.parametrize(
    ("best", "exact", "strength"),
    [
        ([1, 1, 1, 1, 0], 1.0, 1.0),  # the last flag is the end token's
        ([0, 1, 1, 1, 0], 3 / 4, 3 / 4),
        ([1, 0, 1, 1, 0], 3 / 4, 1 / 2),
        ([1, 1, 1, 0, 1], 3 / 4, 1 / 4),  # none at the end: k is |y| − 1
        ([0, 0, 0, 0, 0], 0.0, 1 / 4),
    ],
)
def test_exact_memorisation_and_extraction_strength(best, exact, strength):
    one = scored([bool(b) for b in best])
    assert tofu.exact_memorisation(one) == pytest.approx(exact)
    assert tofu.extraction_strength(one) == pytest.approx(strength)


def test_probabilities_and_truth_ratios():
    assert tofu.probability(1.5) == pytest.approx(math.exp(-1.5))
    assert tofu.probability_with_options(1.0, [2.0, 3.0]) == pytest.approx(
        math.exp(-1) / (math.exp(-1) + math.exp(-2) + math.exp(-3)), rel=1e-8
    )
    wrong = [2.0, 4.0, 0.5]
    geometric = math.prod(math.exp(-loss) for loss in wrong) ** (1 / 3)
    assert tofu.truth_ratio(1.0, wrong) == pytest.approx(geometric / math.exp(-1), rel=1e-8)
    with pytest.raises(KifError, match="perturbed"):
        tofu.truth_ratio(1.0, [])
    ratios = [0.5, 2.0, 1.0]
    assert tofu.forget_truth_ratio(ratios) == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert tofu.retain_truth_ratio(ratios) == pytest.approx((0.5 + 0 + 0) / 3)
    mean = np.mean([1 / (1 + r) for r in (math.exp(-1), math.exp(1))])  # P_wrong / P_right of either item
    assert tofu.prob_mean_truth_ratio([1.0, 3.0], [[2.0], [1.0, 3.0]]) == pytest.approx(mean, rel=1e-8)


def test_forget_quality_is_the_ks_test():
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(0, 1, 40), rng.lognormal(0.7, 1, 50)
    p, statistic = tofu.forget_quality(a, b)
    theirs = ks_2samp(1 / a, 1 / b)  # the benchmark's first code inverts both, which changes nothing
    assert (p, statistic) == pytest.approx((theirs.pvalue, theirs.statistic), rel=1e-12)
    assert tofu.forget_quality(a, a)[0] == 1.0
    with pytest.raises(KifError, match="empty"):
        tofu.forget_quality([], b)


def test_composites_are_harmonic_means():
    nine = [0.2, 0.5, 0.9, 0.4, 0.3, 0.8, 0.7, 0.6, 0.1]
    assert tofu.model_utility(nine) == pytest.approx(float(hmean(nine)))
    assert tofu.model_utility([*nine[:8], 0.0]) == 0.0
    assert tofu.memorisation(0.1, 0.2, 0.3, 0.4) == pytest.approx(float(hmean([0.9, 0.8, 0.7, 0.6])))
    assert tofu.utility(0.5, 0.8, 0.6, 0.9) == pytest.approx(float(hmean([0.5, 0.8]) / hmean([0.6, 0.9])))
    assert tofu.aggregate(0.5, 0.6, 0.7) == pytest.approx(float(hmean([0.5, 0.6, 0.7])))
    assert tofu.privacy_score(0.9, 0.5) == pytest.approx(0.2) and tofu.privacy_score(0.0, 0.4) == 0.0
    assert tofu.privacy_score(0.0, 0.0) == 1.0 and tofu.privacy_score(0.5, 0.0) == 0.0
    for bad in ([0.1] * 8, [-0.1] * 9):
        with pytest.raises(KifError):
            tofu.model_utility(bad)
    with pytest.raises(KifError, match="no utility"):
        tofu.utility(0.5, 0.5, 0.0, 0.5)


def test_membership_scores_by_hand():
    one = scored(logp=[-1.0, -5.0, -2.0, -4.0, -0.5, -9.0])
    assert mia.loss(one) == pytest.approx(21.5 / 6)
    assert mia.zlib_score(one, "some text") == pytest.approx(21.5 / 6 / len(zlib.compress(b"some text")))
    assert mia.min_k(one) == pytest.approx((5 + 4) / 2)  # the lowest two of five; the end token is left out
    assert mia.min_k(one, 0.1) == pytest.approx(5.0)
    assert mia.min_k_plus_plus(one) == pytest.approx(-((-5 + 3) / 2 + (-4 + 3) / 2) / 2)
    assert mia.reference_score(one, scored(logp=[-1.0, -1.0])) == pytest.approx(21.5 / 6 - 1)


def test_auc_is_scikit_learns():
    rng = np.random.default_rng(0)
    forget, holdout = rng.normal(0, 1, 30).round(1), rng.normal(0.5, 1, 25).round(1)  # rounded: with ties
    labels = [0] * 30 + [1] * 25
    assert mia.auc(forget, holdout) == pytest.approx(roc_auc_score(labels, [*forget, *holdout]), abs=1e-12)
    assert mia.auc([0.0], [1.0]) == 1.0
    with pytest.raises(KifError, match="holdout"):
        mia.auc([0.1], [])


def test_leaks_against_a_reference():
    assert mia.priv_leak(0.99665, 0.38261249999999997) == pytest.approx(-99.457391, abs=1e-5)  # a published pair
    assert mia.priv_leak(0.5) == pytest.approx(0.0, abs=1e-9)
    assert mia.relative_difference(0.75, 0.5) == pytest.approx(50.0)


def test_gradient_norms_are_those_of_backward_and_leave_the_model(model):
    pairs = [(question(tokenizer(), q), answer(tokenizer(), a)) for q, a in PAIRS]
    before = snapshot(model)
    found = mia.gradient_norms(model, pairs, tokenizer().eos_token_id)
    check_unchanged(model, before)
    for value, (prompt, wanted) in zip(found, pairs, strict=True):
        ids = torch.tensor([[*prompt, *wanted[:-1]]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        model(ids, labels=labels).loss.backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        assert value == pytest.approx(float(torch.stack(norms).mean()), rel=1e-4)
        model.zero_grad(set_to_none=True)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    mia.gradient_norms(model, pairs[:1])
    assert not frozen.requires_grad
    frozen.requires_grad_(True)
