"""suppress_ and its reference against the equation in float64 numpy, and what both leave alone."""

import numpy as np
import pytest
import torch

from kif_kernels import KernelError, SiteTensors, scores, suppress, suppress_
from kif_kernels.suppress import cpu, reference

SETS = [[0, 1, 2, 3, 4], [3], [4, 0, 2], []]
# (relative, absolute): one rounding to the dtype at the end, and what fp32 work inside adds.
ROUNDING = {
    torch.float64: (0, 1e-12),
    torch.float32: (2.0**-24, 4e-6),
    torch.bfloat16: (2.0**-8, 4e-6),
    torch.float16: (2.0**-11, 4e-6),
}


def tokens(n: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_for(n: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(-1, len(SETS), (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("gate", ["hard", "soft", "mixed"])
@pytest.mark.parametrize("affine", [False, True], ids=["to zero", "to target"])
@pytest.mark.parametrize(("n", "width"), [(1, 48), (63, 48), (40, 37), (9, 1), (130, 64)])
def test_it_is_the_equation(make_site, in_numpy, dtype, gate, affine, n, width) -> None:
    site = make_site(width, 5, SETS, gate=gate, affine=affine)
    x, rows = tokens(n, width, dtype), rows_for(n)
    rows[0] = 0
    expected, expected_hits = in_numpy(x, rows.tolist(), site)
    for path in (suppress_, reference.suppress_):
        ours, hits = x.clone(), torch.zeros(n, 3, dtype=torch.bool)
        path(ours, rows, site, hits)
        relative, absolute = ROUNDING[dtype]
        np.testing.assert_allclose(ours.double().numpy(), expected, rtol=relative, atol=absolute)
        assert np.array_equal(hits.numpy(), expected_hits)
    assert n < 40 or expected_hits.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_fast_path_makes_the_same_bits_as_the_reference_for_hard_gates(make_site, dtype) -> None:
    site = make_site(576, 200, [list(range(0, 200, 2)), [7, 3, 199]], bias=-1.5)
    x, rows = tokens(300, 576, dtype), torch.arange(300, dtype=torch.int32) % 3 - 1
    fast, plain = x.clone(), x.clone()
    cpu.suppress_(fast, rows, site)
    reference.suppress_(plain, rows, site)
    assert torch.equal(fast, plain)
    assert not torch.equal(fast, x)


def test_a_basis_in_bf16_is_used_as_it_is(make_site, in_numpy) -> None:
    site = make_site(64, 5, SETS, dtype=torch.bfloat16)
    x, rows = tokens(50, 64), rows_for(50)
    expected, _ = in_numpy(x, rows.tolist(), site)
    suppress_(x, rows, site)
    np.testing.assert_allclose(x.numpy(), expected, rtol=0, atol=4e-6)


def test_batch_rows_apply_to_every_position(make_site) -> None:
    site = make_site(48, 5, SETS, gate="mixed")
    x, rows = tokens(4 * 7, 48).reshape(4, 7, 48), torch.tensor([0, -1, 3, 2], dtype=torch.int32)
    flat, hits, flat_hits = x.clone().reshape(28, 48), *torch.zeros(2, 28, 3, dtype=torch.bool)
    suppress_(flat, rows.repeat_interleave(7), site, flat_hits)
    suppress_(x, rows, site, hits)
    assert torch.equal(x.reshape(28, 48), flat)
    assert torch.equal(hits, flat_hits)
    assert hits.any()


@pytest.mark.parametrize("view", ["every other token", "middle columns", "transposed batch"])
def test_strided_views_are_edited_and_their_surroundings_are_not(make_site, view) -> None:
    whole = tokens(4 * 10, 96).reshape(4, 10, 96)
    cut = {
        "every other token": lambda t: t.reshape(40, 96)[::2, :48],
        "middle columns": lambda t: t[:, 2:9, 20:68],
        "transposed batch": lambda t: t.transpose(0, 1)[:, :, :48],
    }[view]
    x = cut(whole)
    site, rows = make_site(48, 5, SETS), torch.zeros(x.shape[0], dtype=torch.int32)
    packed, before = x.contiguous(), whole.clone()
    suppress_(packed, rows, site)
    suppress_(x, rows, site)
    assert torch.equal(x, packed)
    assert not torch.equal(whole, before)
    cut(before).copy_(packed)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("shape", [(0, 48), (0, 5, 48), (3, 0, 48)], ids=str)
def test_no_tokens_is_no_work(make_site, shape) -> None:
    site, x = make_site(48, 5, SETS), torch.empty(shape)
    rows = torch.zeros(shape[0], dtype=torch.int32)
    suppress_(x, rows, site, torch.zeros(0, 3, dtype=torch.bool))
    assert suppress(x, rows, site).shape == shape
    assert scores(x, site).shape == (*shape[:-1], 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tokens_on_which_nothing_fires_keep_their_bytes(make_site, dtype) -> None:
    site = make_site(48, 5, SETS, bias=-2.0)
    x, rows = tokens(200, 48, dtype), rows_for(200)
    x[3, 5] = -0.0
    fires = torch.zeros(200, 3, dtype=torch.bool)
    before = x.clone()
    suppress_(x, rows, site, fires)
    still = ~fires.any(1)
    as_bytes = [t[still].view(torch.int32 if dtype == torch.float32 else torch.int16) for t in (x, before)]
    assert torch.equal(*as_bytes)
    assert 0 < still.sum() < 200
    assert (x != before).any(1)[~still].all()


def test_rows_without_a_set_are_not_written_even_where_they_would_fire(make_site) -> None:
    site = make_site(48, 5, SETS, bias=50.0)
    x = tokens(30, 48)
    x[0] = float("nan")
    before, rows = x.clone(), torch.full((30,), -1, dtype=torch.int32)
    rows[10:20] = 3  # the empty set
    rows[29] = 0
    suppress_(x, rows, site)
    assert x[:29].numpy().tobytes() == before[:29].numpy().tobytes()
    assert not torch.equal(x[29], before[29])


def test_free_slots_cannot_fire(make_site) -> None:
    site = make_site(16, 0, [[]], free=4)
    x, before = (t.clone() for t in [tokens(9, 16)] * 2)
    site.write_set(0, [2])  # a stale set that still names one
    suppress_(x, torch.zeros(9, dtype=torch.int32), site)
    assert torch.equal(x, before)
    assert torch.equal(scores(x, site), torch.full((9, 4), -torch.inf))


def test_hits_are_added_never_taken_back(make_site) -> None:
    site, x = make_site(48, 5, SETS, bias=-50.0), tokens(10, 48)
    hits = torch.eye(10, 3, dtype=torch.bool)
    suppress_(x, torch.zeros(10, dtype=torch.int32), site, hits)
    assert torch.equal(hits, torch.eye(10, 3, dtype=torch.bool))


def test_updates_follow_the_order_of_the_set(make_site, in_numpy) -> None:
    site = make_site(16, 3, [[0, 1, 2], [2, 0, 1]], bias=9.0, rank=4)
    x = tokens(8, 16)
    results = []
    for row in (0, 1):
        ours, rows = x.clone(), torch.full((8,), row, dtype=torch.int32)
        suppress_(ours, rows, site)
        np.testing.assert_allclose(ours.numpy(), in_numpy(x, rows.tolist(), site)[0], rtol=0, atol=4e-6)
        results.append(ours)
    assert (results[0] - results[1]).abs().max() > 0.1


def test_scores_are_taken_before_any_update(make_site) -> None:
    """Two equal signatures: after the first has emptied the direction the second's own score would be negative."""
    site = make_site(4, 2, [[0, 1]], bias=0.0, affine=False, rank=1)
    site.detector[:2] = torch.tensor([2.0, 0, 0, 0])
    site.basis[:2] = 0
    site.basis[:2, 0, 0] = 1
    site.bias[:2], site.strength[:2] = -1.0, 0.5
    x, hits = torch.tensor([[3.0, 1, 1, 1]]), torch.zeros(1, 1, dtype=torch.bool)
    suppress_(x, torch.zeros(1, dtype=torch.int32), site, hits)
    assert torch.equal(x, torch.tensor([[0.75, 1, 1, 1]]))


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e10, 1e17, 1e25, 1e37])
@pytest.mark.parametrize("n", [1, 5])
def test_tiny_and_huge_rows_are_decided_right(make_site, in_numpy, size, n) -> None:
    site = make_site(48, 5, SETS, gate="mixed", affine=size > 1)
    x, rows = tokens(n, 48) * size, torch.zeros(n, dtype=torch.int32)
    (expected, hits), ours, found = in_numpy(x, rows.tolist(), site), x.clone(), torch.zeros(n, 3, dtype=torch.bool)
    suppress_(ours, rows, site, found)
    assert np.array_equal(found.numpy(), hits)
    np.testing.assert_allclose(ours.double().numpy() / size, expected / size, rtol=0, atol=4e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_rows_that_are_not_finite_fire_nothing_and_disturb_nobody(make_site, bad, gate) -> None:
    site, rows = make_site(48, 5, SETS, gate=gate, bias=1.0), torch.zeros(6, dtype=torch.int32)
    x = tokens(6, 48)
    alone = x.clone()
    suppress_(alone, rows, site)
    assert not torch.equal(alone, x)
    x[2, 7] = bad
    before, hits = x.clone(), torch.zeros(6, 3, dtype=torch.bool)
    suppress_(x, rows, site, hits)
    assert x[2].numpy().tobytes() == before[2].numpy().tobytes()
    assert not hits[2].any()
    assert torch.equal(x[[0, 1, 3, 4, 5]], alone[[0, 1, 3, 4, 5]])
    single = before[2:3].clone()
    suppress_(single, rows[:1], site)
    assert single.numpy().tobytes() == before[2:3].numpy().tobytes()


def test_the_root_is_correctly_rounded() -> None:
    """As a GPU's is, or the two could decide differently by one step; torch's own fp32 root may not be."""
    x = torch.rand(20000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 20000)
    assert np.array_equal(reference.root(x).numpy(), np.sqrt(x.numpy()))


def test_scores_match_numpy_and_the_gate(make_site) -> None:
    site, x = make_site(100, 5, SETS), tokens(2 * 9, 100).reshape(2, 9, 100)
    got = scores(x, site)
    v = x.double().numpy()
    v = v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        got[..., :5].numpy(), v @ site.detector[:5].double().numpy().T + site.bias[:5].numpy(), atol=1e-5
    )
    assert got.dtype == torch.float32
    hits = torch.zeros(18, 3, dtype=torch.bool)
    suppress_(x, torch.ones(2, dtype=torch.int32), site, hits)
    assert torch.equal(hits[:, 1], got[..., 3].flatten() > 0)


@pytest.mark.parametrize(
    ("x", "rows", "message"),
    [
        (torch.zeros(2, 47), torch.zeros(2, dtype=torch.int32), "48 wide"),
        (torch.zeros(2, 48), torch.zeros(3, dtype=torch.int32), r"expected torch.int32 \[2\]"),
        (torch.zeros(2, 48), torch.zeros(2, dtype=torch.int64), "torch.int32"),
        (torch.zeros(2, 48, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), "torch.int32; expected"),
        (torch.zeros(48), torch.zeros(1, dtype=torch.int32), r"\[N, D\] or \[B, T, D\]"),
        (torch.zeros(2, 48, device="meta"), torch.zeros(2, dtype=torch.int32), "on meta"),
        (torch.zeros(1, 48).expand(2, 48), torch.zeros(2, dtype=torch.int32), "overlap"),
        (torch.zeros(2, 48, requires_grad=True), torch.zeros(2, dtype=torch.int32), "gradient"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make_site, x, rows, message) -> None:
    with pytest.raises(KernelError, match=message) as caught:
        suppress_(x, rows, make_site(48, 5, SETS))
    assert "\n" not in str(caught.value)


def test_hits_of_another_shape_are_refused(make_site) -> None:
    with pytest.raises(KernelError, match="a row for each token"):
        suppress_(
            torch.zeros(2, 3, 48), torch.zeros(2, dtype=torch.int32), make_site(48, 5, SETS), torch.zeros(2, 3).bool()
        )


@pytest.mark.parametrize("field", ["bias", "basis", "owner", "sets"])
def test_a_site_of_wrong_tensors_is_refused(make_site, field) -> None:
    site = make_site(48, 5, SETS)
    wrong = {name: getattr(site, name) for name in site.__dataclass_fields__} | {field: torch.zeros(3, 3, 3, 3)}
    with pytest.raises(KernelError):
        SiteTensors(**wrong).check()


def test_a_capsule_set_written_without_its_inverse_is_refused(make_site) -> None:
    site = make_site(16, 5, [[4, 1], []])
    for sets in ([4, 1, 2], [1, 4, -1], [4, -1, -1]):
        again = SiteTensors.empty(width=16, signatures=7, rank=4, rows=2, set_length=3)
        again.write_set(0, [4, 1])
        again.check()
        again.sets[0] = torch.tensor(sets)
        with pytest.raises(KernelError, match="write_set"):
            again.check()
    site.check()
