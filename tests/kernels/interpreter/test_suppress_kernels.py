"""The kernels of suppress_ against the reference and against float64 mathematics."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kif_kernels import Candidates, SiteTensors, tuned
from kif_kernels.suppress import reference
from kif_kernels.suppress.triton import suppress_

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow in the interpreter

SETS = [[0, 1, 2, 3, 4], [3], [4, 0, 2], []]
DTYPES = [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float32, torch.float16))]
SIZES = [(6, 64), (1, 576), (3, 100)]
LARGE = [(17, 576), (2, 4096), (2, 5120)]


def rows_for(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.int32) + 1) % 5 - 1


def plain(x: Tensor, expected_hits: np.ndarray, rows: Tensor, site: SiteTensors) -> Tensor:
    """The same updates in the dtype's own arithmetic, where float64 says that they fire (hard gates)."""
    out = x.clone()
    for n, row in enumerate(rows.tolist()):
        for s in [] if row < 0 else [s for s in site.sets[row].tolist() if s >= 0]:
            if expected_hits[n, s]:
                basis, target = site.basis[s].to(x.dtype), site.target[s].to(x.dtype)
                out[n] -= site.strength[s].to(x.dtype) * (basis.T @ (basis @ out[n] - target))
    return out


def both(
    x: Tensor, rows: Tensor, site: SiteTensors, candidates: Candidates | None = None
) -> list[tuple[Tensor, Tensor]]:
    """[(x, hits) of the kernels, (x, hits) of the reference]."""
    results = []
    for path in (suppress_, reference.suppress_):
        out, hits = x.clone(), torch.zeros(x.shape[:-1].numel(), int(site.owner.max()) + 1, dtype=torch.bool)
        path(out, rows, site, hits, candidates)
        results.append((out, hits))
    return results


def check_equal(x: Tensor, rows: Tensor, site: SiteTensors, candidates: Candidates | None = None) -> Tensor:
    """The kernels give the reference's bits (gates are hard); returns the hits."""
    (ours, hits), (theirs, expected) = both(x, rows, site, candidates)
    assert torch.equal(ours, theirs)
    assert torch.equal(hits, expected)
    return hits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "width"), [*SIZES, *(pytest.param(*s, marks=pytest.mark.slow) for s in LARGE)])
def test_hard_gates_make_the_references_bits(make_site, random_tokens, in_tiles, dtype, n, width) -> None:
    site = make_site(width, 5, SETS, rank=3, dtype=dtype)
    hits = check_equal(random_tokens(n, width, dtype=dtype), rows_for(n), site)
    assert n < 6 or hits.any()


@pytest.mark.parametrize("rank", [1, 16, pytest.param(63, marks=pytest.mark.slow)])
def test_ranks(make_site, random_tokens, rank) -> None:
    """The site has room for one direction more than any signature uses."""
    hits = check_equal(
        random_tokens(2, 64), torch.tensor([1, 1], dtype=torch.int32), make_site(64, 5, SETS, rank=rank, bias=9.0)
    )
    assert hits.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_at_most_twice_that_of_plain_arithmetic(
    make_site, random_tokens, in_numpy, in_tiles, dtype
) -> None:
    site = make_site(64, 5, SETS, rank=2, bias=0.3)
    site.owner[:5] = torch.arange(5, dtype=torch.int32)
    x, rows = random_tokens(9, 64, dtype=dtype), rows_for(9)
    expected, hits = in_numpy(x, rows.tolist(), site)
    (ours, found), _ = both(x, rows, site)
    error, floor = np.abs(ours.double().numpy() - expected), torch.finfo(dtype).eps * np.abs(expected).max()
    theirs = np.abs(plain(x, hits, rows, site).double().numpy() - expected)
    assert error.max() <= 2 * theirs.max() + floor
    assert np.array_equal(found.numpy(), hits)
    assert hits.sum() > 5


@pytest.mark.parametrize("gate", ["soft", "mixed"])
def test_soft_gates_agree_to_rounding(make_site, random_tokens, in_tiles, gate) -> None:
    site = make_site(64, 5, SETS, gate=gate, rank=2)
    (ours, hits), (theirs, expected) = both(random_tokens(6, 64), rows_for(6), site)
    assert (ours - theirs).abs().max() <= 4e-6
    assert torch.equal(hits, expected)
    assert hits.any()


@pytest.mark.parametrize("bias", [50.0, -50.0], ids=["all fire", "none fires"])
def test_all_or_nothing(make_site, random_tokens, in_tiles, bias) -> None:
    site, x, rows = make_site(48, 5, SETS, bias=bias), random_tokens(3, 48), torch.zeros(3, dtype=torch.int32)
    hits = check_equal(x, rows, site)
    assert bool(hits.all()) == (bias > 0)
    assert bool(hits.any()) == (bias > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_without_a_set_keep_their_bytes(make_site, dtype, in_tiles) -> None:
    site, rows = make_site(48, 5, SETS, bias=50.0), torch.tensor([-1, 3, -1, 3], dtype=torch.int32)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    x = torch.arange(4 * 48).reshape(4, 48).to(integers).mul(12345).view(dtype)  # NaNs with payloads among them
    before = x.clone()
    suppress_(x, rows, site)
    assert torch.equal(x.view(integers), before.view(integers))


@pytest.mark.parametrize("shape", [(0, 48), (0, 5, 48), (3, 0, 48)], ids=str)
def test_no_tokens_is_no_work(make_site, shape) -> None:
    suppress_(torch.empty(shape), torch.zeros(shape[0], dtype=torch.int32), make_site(48, 5, SETS))


@pytest.mark.parametrize("cut", ["every other token", "middle columns", "batch", "transposed batch"])
def test_any_stride_between_tokens(make_site, random_tokens, in_tiles, cut) -> None:
    whole = random_tokens(4, 2, 96)
    view = {
        "every other token": lambda t: t.reshape(8, 96)[::2, :48],
        "middle columns": lambda t: t[:, 1, 20:68],
        "batch": lambda t: t[:, :2, 20:68],
        "transposed batch": lambda t: t.transpose(0, 1)[:, :, :48],
    }[cut]
    site, before = make_site(48, 5, SETS, bias=0.5), whole.clone()
    rows = rows_for(view(whole).shape[0])
    packed = view(whole).contiguous()
    reference.suppress_(packed, rows, site)
    suppress_(view(whole), rows, site)
    assert torch.equal(view(whole), packed)
    assert not torch.equal(whole, before)
    view(before).copy_(packed)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_gets_the_same_bits_in_any_company_and_configuration(
    make_site, random_tokens, monkeypatch, dtype
) -> None:
    site, x, rows = make_site(48, 5, SETS, gate="mixed"), random_tokens(17, 48, dtype=dtype), rows_for(17)
    results = []
    for tiles, block, tokens in ((False, 2, 16), (True, 1, 16), (True, 4, 32)):
        monkeypatch.setattr(tuned, "in_tiles", lambda *_, tiles=tiles: tiles)
        monkeypatch.setattr(tuned, "row_config", lambda *_, block=block: {"BLOCK": block, "num_warps": 1})
        config = {"BLOCK_N": tokens, "BLOCK_S": 16, "BLOCK_D": 16, "PRECISION": "tf32", "num_warps": 1}
        monkeypatch.setattr(tuned, "tile_config", lambda *_, config=config: config)
        results.append(x.clone())
        suppress_(results[-1], rows, site)
    for n in (0, 16):
        results.append(results[0].clone())
        alone = x[n : n + 1].clone()
        suppress_(alone, rows[n : n + 1], site)
        results[-1][n] = alone[0]
    assert all(torch.equal(r, results[0]) for r in results)
    assert not torch.equal(x, results[0])


def test_updates_follow_the_set_whatever_the_slots(make_site, random_tokens, in_tiles) -> None:
    """The same signatures in other slots, listed in the same order, and in another order."""
    site, other = (make_site(16, 6, [[0, 1, 2, 3, 4, 5]], bias=9.0, rank=2) for _ in range(2))
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    for name in ("detector", "bias", "basis", "target", "strength", "owner"):
        getattr(other, name)[order] = getattr(site, name)[:6].clone()
    other.write_screen(slice(0, 6))
    other.write_set(0, order.tolist())
    x, rows = random_tokens(1, 16), torch.zeros(1, dtype=torch.int32)
    (ours, _), (moved, _) = both(x, rows, site)[0], both(x, rows, other)[0]
    assert torch.equal(ours, moved)
    check_equal(x, rows, site)
    site.write_set(0, order.tolist())
    assert (both(x, rows, site)[0][0] - ours).abs().max() > 0.01


def test_sets_longer_than_what_is_decided_at_once(make_site, random_tokens, in_tiles) -> None:
    """70 signatures are two helpings; scores are of the token as it came, in the second helping too."""
    site = make_site(16, 70, [list(range(70)), list(range(64)), [69]], rank=1, bias=-1.0)
    hits = check_equal(random_tokens(3, 16), torch.tensor([0, 1, 2], dtype=torch.int32), site)
    assert hits[0, 32:].any()


@pytest.mark.parametrize("size", [1e-30, 1e10, 1e25, 1e37])
def test_tiny_and_huge_tokens(make_site, random_tokens, in_tiles, size) -> None:
    site = make_site(48, 5, SETS, affine=size > 1)
    check_equal(random_tokens(5, 48) * size, rows_for(5), site)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_tokens_that_are_not_finite_fire_nothing(make_site, random_tokens, in_tiles, bad) -> None:
    site, rows, x = (
        make_site(48, 5, SETS, gate="mixed", bias=1.0),
        torch.zeros(3, dtype=torch.int32),
        random_tokens(3, 48),
    )
    x[1, 7] = bad
    before = x.clone()
    hits = torch.zeros(3, 3, dtype=torch.bool)
    suppress_(x, rows, site, hits)
    assert x[1].numpy().tobytes() == before[1].numpy().tobytes()
    assert not hits[1].any()
    assert hits[0].any()


@pytest.mark.parametrize("edge", [0, 15, 16, 31, 32])
def test_hits_at_the_edges_of_tiles(make_site, edge, monkeypatch) -> None:
    """33 tokens and 33 signatures, one of each at the edge: tiles are of 16."""
    monkeypatch.setattr(tuned, "in_tiles", lambda *_: True)
    site = make_site(16, 33, [list(range(33))], rank=1, bias=-9.0)
    site.bias[edge] = -0.5
    site.write_screen(slice(0, 33))
    x = -site.detector[edge].repeat(33, 1)
    x[edge] *= -1
    hits = check_equal(x, torch.zeros(33, dtype=torch.int32), site)
    assert hits.nonzero().tolist() == [[edge, edge // 2]]


@pytest.mark.parametrize(("width", "aligned"), [(31, True), (576, True), (576, False)])
def test_no_token_is_left_out_however_near_the_gate(random_tokens, on_the_edge, in_tiles, width, aligned) -> None:
    """Scores by one step over the gate; in tiles, of operands that are cut to TF32. One step lower none fires."""
    before = random_tokens(20, width)
    site = on_the_edge(before, before if aligned else random_tokens(20, width, seed=2))
    x = before.clone()
    suppress_(x, torch.arange(20, dtype=torch.int32), site)
    assert (x != before).any(1).all()
    site.bias.copy_(torch.nextafter(site.bias, torch.tensor(float("-inf"))))
    site.write_screen(slice(0, 20))
    x = before.clone()
    suppress_(x, torch.arange(20, dtype=torch.int32), site)
    assert torch.equal(x, before)


def test_hits_are_added_never_taken_back(make_site, random_tokens, in_tiles) -> None:
    site, hits = make_site(48, 5, SETS, bias=-50.0), torch.eye(3, dtype=torch.bool)
    suppress_(random_tokens(3, 48), torch.zeros(3, dtype=torch.int32), site, hits)
    assert torch.equal(hits, torch.eye(3, dtype=torch.bool))


@pytest.mark.parametrize("limit", [1, 3, 8])
@pytest.mark.parametrize("shuffled", [False, True])
def test_with_candidates_the_bits_are_the_same(make_site, random_tokens, limit, shuffled) -> None:
    """Lists in any order, with signatures that do not fire among them, or overflowing; past the last is rubbish."""
    site, x, rows = make_site(48, 5, SETS, bias=0.0), random_tokens(5, 48), rows_for(5)
    candidates = Candidates(torch.zeros(5, dtype=torch.int32), torch.full((5, limit), 1 << 29, dtype=torch.int32))
    for n, row in enumerate(rows.tolist()):
        places = list(range(len(SETS[row]))) if row >= 0 else []
        found = torch.tensor(places[::-1] if shuffled else places, dtype=torch.int32)[:limit]
        candidates.count[n], candidates.found[n, : len(found)] = len(places), found
    hits = check_equal(x, rows, site, candidates)
    assert hits.any()


def test_what_is_not_a_candidate_is_not_looked_at(make_site, random_tokens) -> None:
    """Otherwise the test above could not fail."""
    site, x = make_site(48, 5, SETS, bias=50.0), random_tokens(2, 48)
    before, candidates = x.clone(), Candidates.empty(2)
    suppress_(x, torch.zeros(2, dtype=torch.int32), site, None, candidates)
    assert torch.equal(x, before)
