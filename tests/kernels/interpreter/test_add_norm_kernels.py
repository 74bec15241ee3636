"""The fused kernels against the reference and against float64 mathematics."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kif_kernels import Candidates, detect
from kif_kernels.add_norm_suppress import reference
from kif_kernels.add_norm_suppress.triton import add_norm_suppress_, suppress_normed_

SETS = [[0, 1, 2, 3, 4], [3], [4, 0, 2], []]
DTYPES = [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float32, torch.float16))]
SIZES = [(6, 64), (1, 576), (3, 100)]
LARGE = [(17, 576), (2, 4096), (2, 5120)]
EPSILON = 1e-5


def rows_for(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.int32) + 1) % 5 - 1


def call(path, first: Tensor, residual: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """What the path makes of copies of the two tensors."""
    first, residual = first.clone(), residual.clone()
    path(first, residual, *arguments)
    return first, residual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("one_plus", [False, True], ids=["Llama", "Gemma"])
@pytest.mark.parametrize(("n", "width"), [*SIZES, *(pytest.param(*s, marks=pytest.mark.slow) for s in LARGE)])
def test_it_is_the_reference(make_site, random_tokens, dtype, one_plus, n, width) -> None:
    """The residual has its bits. The norm's sum has another order, so it may differ where rounding is on an edge."""
    site, rows = make_site(width, 5, SETS, dtype=dtype), rows_for(n)
    hidden, residual, weight = (
        random_tokens(*s, seed=i, dtype=dtype) for i, s in enumerate([(n, width)] * 2 + [(width,)])
    )
    hits, expected_hits = torch.zeros(2, n, 3, dtype=torch.bool)
    more = (rows, site, weight, EPSILON, one_plus)
    normed, total = call(add_norm_suppress_, hidden, residual, *more, hits, None)
    expected, expected_total = call(reference.add_norm_suppress_, hidden, residual, *more, expected_hits)
    assert torch.equal(total, expected_total)
    assert torch.equal(hits, expected_hits)
    step = torch.finfo(dtype).eps * expected.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    assert ((normed - expected).abs() <= step * (8 if dtype == torch.float32 else 1)).all()
    assert n < 6 or hits.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_at_most_twice_that_of_plain_arithmetic(make_site, random_tokens, in_numpy, dtype) -> None:
    site, rows = make_site(64, 5, SETS, gate="mixed"), rows_for(7)
    hidden, residual, weight = (random_tokens(*s, seed=i, dtype=dtype) for i, s in enumerate([(7, 64)] * 2 + [(64,)]))
    normed, total = call(add_norm_suppress_, hidden, residual, rows, site, weight, EPSILON, False, None, None)
    x, hits = in_numpy(hidden.double() + residual.double(), rows.tolist(), site)
    expected = weight.double().numpy() * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPSILON)
    y = torch.from_numpy(x).to(dtype)
    plain = y / ((y * y).mean(-1, keepdim=True) + EPSILON).sqrt() * weight
    for ours, theirs, exact in ((normed, plain, expected), (total, hidden + residual, x)):
        error = np.abs(ours.double().numpy() - exact).max()
        theirs_error = np.abs(theirs.double().numpy() - exact)[~hits.any(1)].max()
        assert error <= 2 * theirs_error + torch.finfo(dtype).eps * np.abs(exact).max()
    assert hits.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_nothing_fires_bits_are_those_of_an_empty_set(make_site, random_tokens, dtype) -> None:
    site, rows = make_site(48, 5, SETS, bias=-1.3), torch.zeros(6, dtype=torch.int32)
    hidden, residual, weight = (random_tokens(*s, seed=i, dtype=dtype) for i, s in enumerate([(6, 48)] * 2 + [(48,)]))
    hits = torch.zeros(6, 3, dtype=torch.bool)
    ours = call(add_norm_suppress_, hidden, residual, rows, site, weight, EPSILON, False, hits, None)
    idle = call(add_norm_suppress_, hidden, residual, rows - 1, site, weight, EPSILON, False, None, None)
    empty = call(add_norm_suppress_, hidden, residual, rows + 3, site, weight, EPSILON, False, None, None)
    still = ~hits.any(1)
    assert 0 < still.sum() < 6
    for a, b, c in zip(ours, idle, empty, strict=True):
        assert torch.equal(b, c)
        assert torch.equal(a[still], b[still])
        assert (a != b).any(1)[~still].all()


@pytest.mark.parametrize("bias", [-50.0, 50.0], ids=["none fires", "all fire"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_huge_tokens_lose_nothing(make_site, random_tokens, bias) -> None:
    """They are worked on at 2⁻⁸⁰ of their size, where their smallest entries would vanish."""
    site, rows = make_site(48, 5, SETS, bias=bias), torch.zeros(1, dtype=torch.int32)
    hidden, residual = random_tokens(1, 48) * 1e17, torch.zeros(1, 48)
    hidden[0, 3] = 1e-18
    more = (rows, site, torch.ones(48), EPSILON, False, None)
    _, ours = call(add_norm_suppress_, hidden, residual, *more, None)
    _, theirs = call(reference.add_norm_suppress_, hidden, residual, *more)
    assert torch.equal(ours, theirs)
    assert (ours[0, 3] == hidden[0, 3]) == (bias < 0)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_multiplies_in_its_own_dtype(make_site, random_tokens, weight_dtype) -> None:
    hidden, residual = (random_tokens(4, 64, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    weight, rows = random_tokens(64, seed=3, dtype=weight_dtype), torch.full((4,), -1, dtype=torch.int32)
    more = (rows, make_site(64, 1, [[]]), weight, EPSILON, False, None)
    ours, theirs = (
        call(f, hidden, residual, *more, None)[0] for f in (add_norm_suppress_, reference.add_norm_suppress_)
    )
    assert torch.equal(ours, theirs)


def test_candidates_change_nothing_and_overflow_is_exact(make_site, random_tokens) -> None:
    site, rows, weight = make_site(48, 5, SETS), rows_for(6), random_tokens(48, seed=3)
    hidden, residual = random_tokens(6, 48), random_tokens(6, 48, seed=2)
    without = call(add_norm_suppress_, hidden, residual, rows, site, weight, EPSILON, False, None, None)
    for limit in (1, 4):
        candidates = Candidates.empty(6, limit=limit)
        detect(hidden, rows, site, candidates, residual=residual)
        ours = call(add_norm_suppress_, hidden, residual, rows, site, weight, EPSILON, False, None, candidates)
        assert all(torch.equal(a, b) for a, b in zip(ours, without, strict=True))
        assert (candidates.count > limit).any() == (limit == 1)


@pytest.mark.parametrize("path", [add_norm_suppress_, suppress_normed_])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_gets_the_same_bits_in_any_company_and_configuration(
    make_site, random_tokens, monkeypatch, dtype, path
) -> None:
    from kif_kernels import tuned

    site, rows = make_site(48, 5, SETS, gate="mixed"), rows_for(5)
    hidden, residual, weight = (random_tokens(*s, seed=i, dtype=dtype) for i, s in enumerate([(5, 48)] * 2 + [(48,)]))
    together = call(path, hidden, residual, rows, site, weight, EPSILON, False, None, None)
    monkeypatch.setattr(tuned, "row_config", lambda *_: {"BLOCK": 4, "num_warps": 1})
    for n in range(5):
        one = slice(n, n + 1)
        alone = call(path, hidden[one], residual[one], rows[one], site, weight, EPSILON, False, None, None)
        assert all(torch.equal(a[0], t[n]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize("path", [add_norm_suppress_, suppress_normed_])
def test_strides_are_honoured_and_surroundings_are_not_written(make_site, random_tokens, path) -> None:
    """The two tensors of different strides, in buffers poisoned around them."""
    site, weight, rows = make_site(48, 5, SETS), random_tokens(48, seed=3), torch.tensor([0, -1], dtype=torch.int32)
    buffers = [torch.full(shape, float("nan")) for shape in ((2, 3, 96), (4, 3, 64))]
    views = [buffers[0][:, :, 40:88], buffers[1][::2, :, :48]]
    values = [random_tokens(2, 3, 48, seed=s) for s in (1, 2)]
    for view, value in zip(views, values, strict=True):
        view.copy_(value)
    expected = call(path, *values, rows, site, weight, EPSILON, False, None, None)
    path(*views, rows, site, weight, EPSILON, False, None, None)
    for view, value, buffer in zip(views, expected, buffers, strict=True):
        assert torch.equal(view, value)
        view.fill_(float("nan"))
        assert buffer.isnan().all()


@pytest.mark.parametrize("path", [add_norm_suppress_, suppress_normed_])
@pytest.mark.parametrize("shape", [(0, 48), (3, 0, 48)], ids=str)
def test_no_tokens_is_no_work(make_site, path, shape) -> None:
    rows = torch.zeros(shape[0], dtype=torch.int32)
    path(*torch.empty(2, *shape), rows, make_site(48, 5, SETS), torch.ones(48), EPSILON, False, None, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("one_plus", [False, True], ids=["Llama", "Gemma"])
@pytest.mark.parametrize(("n", "width"), [*SIZES, *(pytest.param(*s, marks=pytest.mark.slow) for s in LARGE)])
def test_after_the_hosts_norm_only_fired_tokens_change(make_site, random_tokens, dtype, one_plus, n, width) -> None:
    """What the host left is poisoned, so that a token that was written although nothing fired would show."""
    site, rows, weight = make_site(width, 5, SETS), rows_for(n), random_tokens(width, dtype=dtype)
    normed, residual = torch.full((n, width), float("nan"), dtype=dtype), random_tokens(n, width, seed=2, dtype=dtype)
    hits = torch.zeros(n, 3, dtype=torch.bool)
    ours, total = call(suppress_normed_, normed, residual, rows, site, weight, EPSILON, one_plus, hits, None)
    theirs, expected = call(reference.suppress_normed_, normed, residual, rows, site, weight, EPSILON, one_plus)
    fired = hits.any(1)
    assert n < 6 or 0 < fired.sum() < n
    assert torch.equal(total, expected)
    assert torch.equal(total[~fired], residual[~fired])
    assert ours[~fired].isnan().all()
    # The mean square is summed in another order: about log2(576) roundings on each side, half of which the root keeps,
    # and three of products. In 16 bits nothing but the last rounding shows.
    steps = 8 if dtype == torch.float32 else 2
    assert torch.allclose(ours[fired], theirs[fired], rtol=steps * torch.finfo(dtype).eps, atol=0)
