"""Closed forms and the Fisher penalty."""

import numpy as np
import pytest
import torch

from kif_runtime.bake.objectives import light_edit, orthogonal, paper_terms
from kif_runtime.blocks import decoder_blocks


def test_an_orthogonalised_matrix_writes_nothing_along_the_direction():
    rng = np.random.default_rng(0)
    w, u = rng.normal(size=(8, 5)), np.linalg.qr(rng.normal(size=(8, 2)))[0].T
    b, a = orthogonal.update(torch.from_numpy(w), torch.from_numpy(u))
    assert b.shape == (8, 2) and a.shape == (2, 5)
    after = w + (b @ a).numpy()
    assert np.abs(u @ after).max() < 1e-12
    np.testing.assert_allclose(after, (np.eye(8) - u.T @ u) @ w, atol=1e-12)
    half = orthogonal.update(torch.from_numpy(w), torch.from_numpy(u), 0.5)
    np.testing.assert_allclose(u @ (w + (half[0] @ half[1]).numpy()), 0.5 * u @ w, atol=1e-12)


def test_the_matrices_that_write_into_the_residual_stream_are_known_in_every_family(tiny_model, family):
    """What a block adds vanishes where all projections of these names write zeros: nothing else writes.

    Except Mixtral's experts, which are one tensor and no modules: the objective leaves them, and says so.
    """
    model = tiny_model(family)
    block = decoder_blocks(model)[1]
    for name, module in block.named_modules():
        if name.rpartition(".")[2] in orthogonal.WRITERS:
            for parameter in module.parameters():
                torch.nn.init.zeros_(parameter)
    seen = []

    def look(_module, args, kwargs, output):
        seen.append((args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output))

    block.register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(torch.arange(3, 7)[None])
    assert torch.allclose(*seen[0], atol=1e-6) == (family != "mixtral")


def test_the_light_edit_solves_its_least_squares_problem():
    rng = np.random.default_rng(1)
    keys, changes, retain = rng.normal(size=(3, 10)), rng.normal(size=(3, 6)), rng.normal(size=(200, 10))
    retain[:, 6:] *= 1e-3  # four dimensions that retain keys hardly use
    p = light_edit.free_projector(torch.from_numpy(retain)).numpy()
    assert np.linalg.matrix_rank(p) == 4
    np.testing.assert_allclose(p @ p, p, atol=1e-12)
    b, a = light_edit.light_edit(*(torch.from_numpy(x) for x in (keys, changes, p)), ridge=1e-2)
    ridge = 1e-2 * np.trace(keys @ p @ keys.T) / 3
    # AlphaEdit's form: solved for by the normal equations in the input dimension instead
    expected = np.linalg.solve((keys.T @ keys @ p + ridge * np.eye(10)).T, (changes.T @ keys @ p).T).T
    got = (b @ a).numpy()
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-4)
    assert np.abs(got @ retain.T).max() < 0.05 * np.abs(got @ keys.T).max()
    exact = light_edit.light_edit(*(torch.from_numpy(x) for x in (keys, changes, p)), ridge=1e-9)
    np.testing.assert_allclose((exact[0] @ exact[1]).numpy() @ keys.T, changes.T, atol=1e-3)


def test_an_edit_is_cut_to_a_rank_by_its_singular_values():
    rng = np.random.default_rng(2)
    b, a = torch.from_numpy(rng.normal(size=(7, 5))), torch.from_numpy(rng.normal(size=(5, 9)))
    whole = (b @ a).numpy()
    s = np.linalg.svd(whole, compute_uv=False)
    cut_b, cut_a, lost = light_edit.of_rank(b, a, 2)
    assert cut_b.shape == (7, 2) and cut_a.shape == (2, 9)
    assert np.linalg.norm(whole - (cut_b @ cut_a).numpy()) ** 2 == pytest.approx((s[2:] ** 2).sum())
    assert lost == pytest.approx((s[2:] ** 2).sum() / (s**2).sum())
    same_b, same_a, lost = light_edit.of_rank(b, a, 8)
    np.testing.assert_allclose((same_b @ same_a).numpy(), whole, atol=1e-12)
    assert lost == 0


def test_fisher_is_the_mean_squared_gradient_and_the_penalty_its_quadratic_form():
    rng = np.random.default_rng(3)
    x, y, theta = rng.normal(size=(5, 3)), rng.normal(size=5), rng.normal(size=3)
    parameter = torch.from_numpy(theta).requires_grad_(True)
    unused = torch.zeros(2, requires_grad=True)
    losses = (((torch.from_numpy(x[i]) * parameter).sum() - y[i]) ** 2 for i in range(5))
    found = paper_terms.fisher(losses, {"theta": parameter, "unused": unused})
    slopes = 2 * (x @ theta - y)[:, None] * x
    np.testing.assert_allclose(found["theta"], (slopes**2).mean(0), rtol=1e-5)
    assert not found["unused"].any()
    moved = {"theta": (parameter + 0.5).detach().requires_grad_(True), "unused": unused}
    start = {"theta": parameter.detach(), "unused": unused.detach()}
    assert paper_terms.ewc(moved, start, found).item() == pytest.approx(0.25 * (slopes**2).mean(0).sum(), rel=1e-5)
    assert paper_terms.ewc(start, start, found) == 0
