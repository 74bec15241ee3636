"""Losses on tokens against float64 numpy and scipy, written from the equations and not from the code."""

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, softmax

from kif_runtime.bake.objectives import paper_terms, preference, tokens, undial

B, T, V = 3, 6, 11


@pytest.fixture()
def batch():
    """logits and reference logits [B, T, V], ids [B, T], completion [B, T] with rows of different lengths, float64."""
    rng = np.random.default_rng(0)
    completion = np.zeros((B, T), dtype=bool)
    completion[0, 2:5] = completion[1, 4:] = completion[2, 1:4] = True
    return rng.normal(size=(B, T, V)), rng.normal(size=(B, T, V)), rng.integers(0, V, (B, T)), completion


def by_hand(logits, ids, completion):
    """Lists of log p of each completion token, row by row."""
    log_probs = log_softmax(logits, axis=-1)
    return [[log_probs[b, t - 1, ids[b, t]] for t in range(T) if completion[b, t]] for b in range(B)]


def torched(*arrays):
    return [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]


def test_log_probs_of_whole_completions_and_of_their_mean_token(batch):
    logits, _, ids, completion = batch
    expected = by_hand(logits, ids, completion)
    given = torched(logits, ids, completion)
    np.testing.assert_allclose(tokens.sequence_log_prob(*given), [sum(r) for r in expected], rtol=1e-12)
    np.testing.assert_allclose(tokens.mean_log_prob(*given), [np.mean(r) for r in expected], rtol=1e-12)


def test_a_low_precision_batch_is_computed_in_fp32(batch):
    logits, _, ids, completion = torched(*batch)
    half = logits.to(torch.bfloat16)
    got = tokens.sequence_log_prob(half, ids, completion)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, tokens.sequence_log_prob(half.double(), ids, completion).float())


def test_the_training_loss_is_that_of_transformers(tiny_model):
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    out = model(ids, labels=labels)
    torch.testing.assert_close(-tokens.mean_log_prob(out.logits, ids, labels >= 0)[0], out.loss)


def test_preferences(batch):
    logits, reference, ids, completion = batch
    worse = np.roll(ids, 1, axis=0)
    plus, minus = (
        np.array([sum(r) for r in by_hand(logits, i, completion)])
        - np.array([sum(r) for r in by_hand(reference, i, completion)])
        for i in (ids, worse)
    )
    gains = torched(plus, minus)
    np.testing.assert_allclose(preference.dpo(*gains, 0.02), -np.log(expit(0.02 * (plus - minus))), rtol=1e-12)
    np.testing.assert_allclose(preference.npo(gains[1]), -20 * np.log(expit(-0.1 * minus)), rtol=1e-12)
    mean = np.array([np.mean(r) for r in by_hand(logits, ids, completion)])
    expected = -0.8 * np.log(expit(-2.5 * mean - 0.3))
    np.testing.assert_allclose(preference.simnpo(torch.from_numpy(mean), 2.5, 0.3), expected, rtol=1e-12)


def test_npo_starts_as_gradient_ascent_and_fades(batch):
    gain = torch.tensor([0.0, -40.0], dtype=torch.float64, requires_grad=True)
    preference.npo(gain).sum().backward()
    assert gain.grad[0] == pytest.approx(1.0)  # the slope of gradient ascent
    assert gain.grad[1] == pytest.approx(2 * expit(-4.0))


def test_undial(batch):
    logits, reference, ids, completion = batch
    expected = []
    for b in range(B):
        each = []
        for t in np.flatnonzero(completion[b]):
            goal = reference[b, t - 1].copy()
            goal[ids[b, t]] -= 10
            each.append(-(softmax(goal) * log_softmax(logits[b, t - 1])).sum())
        expected.append(np.mean(each))
    given = torched(logits, reference, ids, completion)
    np.testing.assert_allclose(undial.undial(*given, beta=10.0), expected, rtol=1e-12)


def test_divergence_is_that_of_the_definition_and_vanishes_with_its_gradient_where_equal(batch):
    logits, reference, _, completion = batch
    p, q = softmax(reference, axis=-1), softmax(logits, axis=-1)
    each = (p * np.log(p / q)).sum(-1)
    expected = [each[b, :-1][completion[b, 1:]].mean() for b in range(B)]
    np.testing.assert_allclose(tokens.kl(*torched(reference, logits, completion)), expected, rtol=1e-10)
    same = torch.from_numpy(logits).requires_grad_(True)
    tokens.kl(same.detach(), same, torch.from_numpy(completion)).sum().backward()
    assert same.grad.abs().max() < 1e-15


def test_unlikelihood_of_an_answer_and_of_name_tokens(batch):
    logits, _, ids, completion = batch
    expected = [np.mean([-np.log(1 - np.exp(lp)) for lp in row]) for row in by_hand(logits, ids, completion)]
    given = torched(logits, ids, completion)
    np.testing.assert_allclose(paper_terms.unlikelihood(*given), expected, rtol=1e-10)
    names = np.zeros(V, dtype=bool)
    names[[2, 7]] = True
    mass = softmax(logits, axis=-1)[..., [2, 7]].sum(-1)
    expected = [np.mean([-np.log(1 - mass[b, t - 1]) for t in np.flatnonzero(completion[b])]) for b in range(B)]
    got = paper_terms.name_unlikelihood(*torched(logits, names, completion))
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_unlikelihood_still_pushes_where_the_probability_rounds_to_one():
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 1] = 60.0  # p = 1 in fp32
    logits.requires_grad_(True)
    loss = paper_terms.unlikelihood(logits, torch.tensor([[0, 1]]), torch.tensor([[False, True]]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(60 - np.log(3), rel=1e-6)
    assert logits.grad[0, 0, 1] == pytest.approx(1.0)


def test_a_row_without_completion_is_silent(batch):
    logits, _, ids, completion = torched(*batch)
    completion[1] = False
    assert tokens.mean_log_prob(logits, ids, completion)[1] == 0
