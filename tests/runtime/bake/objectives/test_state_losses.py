"""Losses and weights on hidden states against float64 numpy, scipy and properties."""

import numpy as np
import pytest
import scipy.linalg
import torch

from kif_runtime.bake.objectives import egup, reglu, rmu, rna, untouched

B, T, D = 3, 5, 8


@pytest.fixture()
def states():
    rng = np.random.default_rng(1)
    counted = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 1, 0, 0]], dtype=bool)
    return rng.normal(size=(B, T, D)), rng.normal(size=(B, T, D)), counted


def test_distance_to_a_target_and_to_the_reference(states):
    now, before, counted = states
    target = np.arange(D) / D
    for goal in (target, before):
        each = ((now - goal) ** 2).mean(-1)
        expected = [each[b][counted[b]].mean() for b in range(B)]
        got = rmu.distance(*(torch.from_numpy(np.asarray(x)) for x in (now, goal, counted)))
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    same = torch.from_numpy(now).requires_grad_(True)
    held = rmu.distance(same, same.detach(), torch.from_numpy(counted)).sum()
    held.backward()
    assert held == 0 and not same.grad.any()


def test_targets(states):
    forget, retain = (torch.from_numpy(x.reshape(-1, D)) for x in states[:2])
    seed = torch.Generator().manual_seed(0)
    u = rmu.random_direction(D, seed)
    assert u.norm().item() == pytest.approx(1) and (u >= 0).all()
    forget[:, 3] *= 50  # the dimension that forget text alone uses
    ratio = np.log1p(forget.abs().numpy().mean(0) / (retain.abs().numpy().mean(0) + 1e-6))
    importance = rmu.importance(forget, retain)
    np.testing.assert_allclose(importance, ratio / ratio.max(), rtol=1e-12)
    assert int(importance.argmax()) == 3 and importance.max() == 1
    target = rmu.structured_direction(forget, retain, seed)
    np.testing.assert_allclose(target.abs(), importance / D**0.5, rtol=1e-6)
    assert (target < 0).any() and (target > 0).any()


def test_noise_has_the_deviation_asked_and_a_seed_repeats_it():
    zeros = torch.zeros(4, 500, 16)
    drawn = rna.noisy(zeros, 0.5, torch.Generator().manual_seed(3))
    assert drawn.mean().abs() < 0.01 and drawn.std().item() == pytest.approx(0.5, rel=0.01)
    assert torch.equal(drawn, rna.noisy(zeros, 0.5, torch.Generator().manual_seed(3)))


def test_the_directions_of_reglu(states):
    rng = np.random.default_rng(2)
    forget, retain = rng.normal(size=(40, D)) * 2 + 1, rng.normal(size=(60, D))
    moments = [reglu.Moments(), reglu.Moments()]
    for made, rows in zip(moments, (forget, retain), strict=True):
        made.add(torch.from_numpy(rows[:17]))
        made.add(torch.from_numpy(rows[17:]))
    centre = retain.mean(0)
    covariances = [(x - centre).T @ (x - centre) / len(x) for x in (forget, retain)]
    values, vectors = scipy.linalg.eigh(0.3 * covariances[0] - 0.7 * covariances[1])
    best = vectors[:, np.argsort(-values)[:3]]
    u = reglu.forget_directions(*moments, rank=3).numpy()
    np.testing.assert_allclose(u @ u.T, best @ best.T, atol=1e-10)  # the same subspace, whatever the signs
    assert reglu.retain_basis(moments[1], 99).shape == (D, D)
    top = scipy.linalg.eigh(covariances[1], subset_by_index=[D - 2, D - 1])[1]
    p = reglu.retain_basis(moments[1], 2).numpy()
    np.testing.assert_allclose(p @ p.T, top @ top.T, atol=1e-10)
    b = torch.from_numpy(rng.normal(size=(D, 4)))
    expected = np.linalg.norm(b.numpy().T @ p, "fro") ** 2
    assert reglu.penalty(b, torch.from_numpy(p)).item() == pytest.approx(expected)
    assert reglu.penalty(torch.from_numpy(np.linalg.qr(p, "complete")[0][:, 2:]), torch.from_numpy(p)) < 1e-20


def test_reglu_starts_as_nothing_or_as_a_known_step():
    rng = np.random.default_rng(3)
    w, u = rng.normal(size=(D, 6)), np.linalg.qr(rng.normal(size=(D, 2)))[0]
    b, a = reglu.start(torch.from_numpy(w), torch.from_numpy(u), 0.0)
    assert not (b @ a).any() and b.any()
    b, a = reglu.start(torch.from_numpy(w), torch.from_numpy(u), 1.0)
    left = w + (b @ a).numpy()
    assert np.abs(u.T @ left).max() < 1e-12  # step 1 takes the whole component away
    np.testing.assert_allclose(left, w - u @ u.T @ w)


def test_weights_grow_with_entanglement_and_fall_with_own_shift():
    retain = torch.tensor([[1.0, 0.0], [1.0, 0.2]])
    forget = torch.tensor([[1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    entangled = egup.entanglement(forget, retain, 0.2)
    assert entangled[0] > entangled[1] > entangled[2] and entangled.mean().item() == pytest.approx(1)
    near = (forget @ retain.mean(0)) / (forget.norm(dim=1) * retain.mean(0).norm())
    expected = 3 * np.exp(near.numpy() / 0.2) / np.exp(near.numpy() / 0.2).sum()
    np.testing.assert_allclose(entangled, expected, rtol=1e-5)
    turned = torch.tensor([[0.1, -1.0], [0.0, 1.0], [1.0, 0.0]])
    assert egup.remaining(turned, forget).tolist() == pytest.approx([0, 1, 0], abs=1e-6)


def test_embedding_counts_the_tokens_of_the_mask(states):
    now, _, counted = states
    expected = np.stack([now[b][counted[b]].mean(0) for b in range(B)])
    got = untouched.embedding(torch.from_numpy(now), torch.from_numpy(counted))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_only_pushing_below_the_proxy_costs():
    student = torch.tensor([-1.0, -5.0], requires_grad=True)
    loss = egup.overshoot(student, torch.tensor([-3.0, -3.0]))
    loss.sum().backward()
    assert loss.tolist() == [0.0, 2.0] and student.grad.tolist() == [0.0, -1.0]
