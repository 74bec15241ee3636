"""add_norm_suppress_ against float64 mathematics, and against the models' own norms where nothing fires."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kif_kernels import KernelError, add_norm_suppress_, suppress_
from kif_kernels.add_norm_suppress import reference

SETS = [[0, 1, 2, 3, 4], [3], [4, 0, 2], []]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = 1e-5


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call(path, hidden: Tensor, residual: Tensor, rows: Tensor, site, weight: Tensor, **more) -> tuple[Tensor, Tensor]:
    """The path's outputs, on copies of its inputs."""
    normed, total = hidden.clone(), residual.clone()
    path(normed, total, rows, site, weight, EPSILON, **more)
    return normed, total


def norm_in_float64(x: np.ndarray, weight: Tensor, one_plus: bool) -> np.ndarray:
    w = weight.double().numpy() + one_plus
    return w * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPSILON)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("one_plus", [False, True], ids=["Llama", "Gemma"])
@pytest.mark.parametrize("path", [add_norm_suppress_, reference.add_norm_suppress_], ids=["fast", "reference"])
@pytest.mark.parametrize(("n", "width"), [(1, 48), (17, 48), (40, 37), (130, 64)])
def test_it_is_the_add_the_operator_and_the_norm(make_site, in_numpy, dtype, one_plus, path, n, width) -> None:
    """Error at most twice that of the same in plain PyTorch with the dtype's own arithmetic, or a rounding."""
    site = make_site(width, 5, SETS, gate="mixed")
    hidden, residual, weight = (
        random(*s, seed=i, dtype=dtype) for i, s in enumerate([(n, width), (n, width), (width,)])
    )
    rows = torch.arange(n, dtype=torch.int32) % 5 - 1 if n > 1 else torch.zeros(1, dtype=torch.int32)
    hits = torch.zeros(n, 3, dtype=torch.bool)
    normed, total = call(path, hidden, residual, rows, site, weight, one_plus=one_plus, hits=hits)
    x, expected_hits = in_numpy(hidden.double() + residual.double(), rows.tolist(), site)
    plain = torch.from_numpy(x).to(dtype)
    plain_normed = plain / (plain * plain).mean(-1, keepdim=True).add(EPSILON).sqrt() * (weight + int(one_plus))
    expected = norm_in_float64(x, weight, one_plus)
    rounding = torch.finfo(dtype).eps * max(1.0, np.abs(expected).max())
    assert np.abs(normed.double().numpy() - expected).max() <= 2 * max(
        np.abs(plain_normed.double().numpy() - expected).max(), rounding
    )
    np.testing.assert_allclose(total.double().numpy(), x, rtol=torch.finfo(dtype).eps / 2, atol=4e-6)
    assert np.array_equal(hits.numpy(), expected_hits)
    assert expected_hits.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["Llama", "Gemma"])
def test_where_nothing_fires_it_has_the_bits_of_the_models_own_norm(make_site, dtype, family) -> None:
    """transformers rounds the sum before its norm, so that sums are chosen that rounding leaves alone."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = (LlamaRMSNorm if family == "Llama" else Gemma2RMSNorm)(576, EPSILON).to(dtype)
    theirs.weight.data = random(576, seed=1, dtype=dtype)
    x = random(40, 576, seed=2, dtype=dtype)
    residual = torch.where(random(40, 576, seed=3) > 0, x, x / 2)
    hidden = x - residual
    assert torch.equal(hidden + residual, x)
    site, rows = make_site(576, 5, SETS, bias=-50.0), torch.arange(40, dtype=torch.int32) % 5 - 1
    more = {"one_plus": family == "Gemma"}
    normed, total = call(add_norm_suppress_, hidden, residual, rows, site, theirs.weight.data, **more)
    assert torch.equal(normed, theirs(hidden + residual))
    assert torch.equal(total, hidden + residual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_variance_is_of_the_sum_before_rounding(make_site, dtype) -> None:
    """1 plus half a step rounds to 1: of the rounded sum the first quotient would be larger."""
    residual, hidden = torch.ones(1, 64, dtype=dtype), torch.full((1, 64), torch.finfo(dtype).eps / 2, dtype=dtype)
    hidden[0, 0] = 1.0
    weight, site = torch.full((64,), 1.0, dtype=torch.float32), make_site(64, 1, [[]])
    normed, total = call(add_norm_suppress_, hidden, residual, torch.zeros(1, dtype=torch.int32), site, weight)
    x = hidden.double() + residual.double()
    assert torch.equal(total, x.to(dtype))
    unrounded, rounded = (norm_in_float64(t.double().numpy(), weight, False)[0, 0] for t in (x, total))
    assert normed[0, 0] == torch.tensor(unrounded).to(dtype)
    assert normed[0, 0] != torch.tensor(rounded).to(dtype)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_multiplies_in_its_own_dtype(make_site, weight_dtype) -> None:
    hidden, residual = (random(20, 64, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    weight, rows = random(64, seed=3, dtype=weight_dtype), torch.full((20,), -1, dtype=torch.int32)
    normed, _ = call(add_norm_suppress_, hidden, residual, rows, make_site(64, 1, [[]]), weight)
    x = hidden.float() + residual.float()
    quotient = torch.nn.functional.rms_norm(x, (64,), eps=EPSILON)
    once, twice = (quotient * weight.float()).bfloat16(), (quotient.bfloat16() * weight).bfloat16()
    assert not torch.equal(once, twice)
    assert torch.equal(normed, once if weight_dtype == torch.float32 else twice)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_on_which_nothing_fires_are_those_of_an_empty_set(make_site, dtype) -> None:
    site = make_site(48, 5, SETS, bias=-2.0)
    hidden, residual, weight = (random(*s, seed=i, dtype=dtype) for i, s in enumerate([(200, 48), (200, 48), (48,)]))
    rows, hits = torch.arange(200, dtype=torch.int32) % 5 - 1, torch.zeros(200, 3, dtype=torch.bool)
    with_sets = call(add_norm_suppress_, hidden, residual, rows, site, weight, hits=hits)
    without = call(add_norm_suppress_, hidden, residual, torch.full_like(rows, -1), site, weight)
    fired = hits.any(1)
    for ours, theirs in zip(with_sets, without, strict=True):
        assert torch.equal(ours[~fired], theirs[~fired])
        assert (ours != theirs).any(1)[fired].all()
    assert 0 < fired.sum() < 200


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_gets_the_same_bits_in_any_company(make_site, dtype) -> None:
    site = make_site(576, 5, SETS, gate="mixed")
    hidden, residual, weight = (random(*s, seed=i, dtype=dtype) for i, s in enumerate([(64, 576), (64, 576), (576,)]))
    rows = torch.arange(64, dtype=torch.int32) % 5 - 1
    together = call(add_norm_suppress_, hidden, residual, rows, site, weight)
    for n in (0, 1, 31, 63):
        one = slice(n, n + 1)
        alone = call(add_norm_suppress_, hidden[one], residual[one], rows[one], site, weight)
        assert all(torch.equal(a[0], t[n]) for a, t in zip(alone, together, strict=True))


def test_batch_rows_apply_to_every_position_and_strides_are_honoured(make_site) -> None:
    site, weight = make_site(48, 5, SETS), random(48, seed=3)
    whole = [random(4, 7, 96, seed=s) for s in (1, 2)]
    hidden, residual = (t[:, :, 20:68] for t in whole)
    rows = torch.tensor([0, -1, 3, 2], dtype=torch.int32)
    flat = call(
        add_norm_suppress_, *(t.reshape(28, 48) for t in (hidden, residual)), rows.repeat_interleave(7), site, weight
    )
    around = [t.clone() for t in whole]
    add_norm_suppress_(hidden, residual, rows, site, weight, EPSILON)
    assert torch.equal(hidden.reshape(28, 48), flat[0])
    assert torch.equal(residual.reshape(28, 48), flat[1])
    for before, after in zip(around, whole, strict=True):
        assert torch.equal(before[:, :, :20], after[:, :, :20])
        assert torch.equal(before[:, :, 68:], after[:, :, 68:])


@pytest.mark.parametrize("shape", [(0, 48), (0, 5, 48), (3, 0, 48)], ids=str)
def test_no_tokens_is_no_work(make_site, shape) -> None:
    rows = torch.zeros(shape[0], dtype=torch.int32)
    add_norm_suppress_(*torch.empty(2, *shape), rows, make_site(48, 5, SETS), torch.ones(48), EPSILON)


def test_fp32_agrees_with_suppress_on_the_sum(make_site) -> None:
    site, rows = make_site(48, 5, SETS, gate="mixed"), torch.zeros(20, dtype=torch.int32)
    hidden, residual = random(20, 48, seed=1), random(20, 48, seed=2)
    _, total = call(add_norm_suppress_, hidden, residual, rows, site, torch.ones(48))
    x = hidden + residual
    suppress_(x, rows, site)
    assert torch.equal(total, x)


@pytest.mark.slow
def test_the_operator_is_registered_soundly_and_graphs_keep_it(make_site) -> None:
    site, rows, weight = make_site(16, 5, SETS, gate="mixed"), torch.zeros(4, dtype=torch.int32), random(16, seed=3)
    hidden, residual, hits = random(4, 16, seed=1), random(4, 16, seed=2), torch.zeros(4, 3, dtype=torch.bool)
    arguments = (hidden.clone(), residual.clone(), rows, *site.tensors, weight, EPSILON, False, hits, None, None)
    torch.library.opcheck(torch.ops.kif.add_norm_suppress_.default, arguments)

    def block(hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        hidden, residual = hidden * 2, residual + 1
        add_norm_suppress_(hidden, residual, rows, site, weight, EPSILON)
        return hidden + 1, residual

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ours, eager in zip(compiled(hidden, residual), block(hidden, residual), strict=True):
            assert torch.equal(ours, eager)


def test_autocast_changes_nothing(make_site) -> None:
    site, rows, weight = make_site(576, 5, SETS), torch.zeros(4, dtype=torch.int32), random(576, seed=3)
    hidden, residual = random(4, 576, seed=1), random(4, 576, seed=2)
    expected = call(add_norm_suppress_, hidden, residual, rows, site, weight)
    with torch.autocast("cpu", torch.bfloat16):
        cast = call(add_norm_suppress_, hidden, residual, rows, site, weight)
    assert all(torch.equal(a, b) for a, b in zip(cast, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 47)}, "hidden is .* 48 wide"),
        (
            {"residual": torch.zeros(3, 48)},
            r"residual is torch.float32 \[3, 48\] on cpu; expected torch.float32 \[2, 48\]",
        ),
        ({"residual": torch.zeros(2, 48).half()}, "residual is torch.float16"),
        ({"residual": torch.zeros(1, 48).expand(2, 48)}, "residual overlap"),
        ({"hidden": torch.zeros(1, 48).expand(2, 48)}, "hidden overlap"),
        ({"hidden": torch.zeros(2, 48, requires_grad=True)}, "hidden needs a gradient"),
        ({"weight": torch.zeros(47)}, r"weight is torch.float32 \[47\]"),
        ({"weight": torch.zeros(48, device="meta")}, "weight is .* on meta"),
        ({"weight": torch.zeros(48, dtype=torch.int32)}, "weight is torch.int32"),
        ({"rows": torch.zeros(3, dtype=torch.int32)}, r"expected torch.int32 \[2\]"),
        ({"hits": torch.zeros(2, 3)}, "a row for each token"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make_site, change, message) -> None:
    fits = {"hidden": torch.zeros(2, 48), "residual": torch.zeros(2, 48), "rows": torch.zeros(2, dtype=torch.int32)}
    arguments = fits | {"weight": torch.ones(48), "hits": None} | change
    with pytest.raises(KernelError, match=message) as caught:
        add_norm_suppress_(**arguments, site=make_site(48, 5, SETS), epsilon=EPSILON)
    assert "\n" not in str(caught.value)
