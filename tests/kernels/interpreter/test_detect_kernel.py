"""The kernel of detect: it never misses what fires, and what it lists lies in the token's set."""

import pytest
import torch
from torch import Tensor

from kif_kernels import Candidates, SiteTensors, tuned
from kif_kernels.detect import reference
from kif_kernels.detect.triton import detect

DTYPES = [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float32, torch.float16))]
SETS = [list(range(40)), [39, 3, 16, 15], [], [31]]


def poisoned(tokens: int, limit: int) -> Candidates:
    candidates = Candidates.empty(tokens, limit=limit)
    candidates.count.fill_(77)
    candidates.found.fill_(-5)
    return candidates


def lists(candidates: Candidates) -> list[list[int] | None]:
    """The places listed for each token, ascending; None where it overflows."""
    limit = candidates.found.shape[1]
    pairs = zip(candidates.count.tolist(), candidates.found.tolist(), strict=True)
    return [sorted(found[:count]) if count <= limit else None for count, found in pairs]


def exact(x: Tensor, rows: Tensor, site: SiteTensors, residual: Tensor | None = None) -> list[list[int] | None]:
    candidates = poisoned(x.shape[:-1].numel(), 64)
    reference.detect(x, rows, site, candidates, residual)
    return lists(candidates)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["hard", "soft"])
@pytest.mark.parametrize(("n", "width"), [(17, 64), (1, 576), (33, 100), (3, 4096)])
def test_what_fires_is_listed_and_little_else(make_site, random_tokens, dtype, gate, n, width) -> None:
    site, rows = make_site(width, 40, SETS, gate=gate, bias=-1.5), (torch.arange(n, dtype=torch.int32) + 1) % 5 - 1
    x, candidates = random_tokens(n, width, dtype=dtype), poisoned(n, 40)
    detect(x, rows, site, candidates)
    found, expected = lists(candidates), exact(x, rows, site)
    assert all(set(e) <= set(f) for e, f in zip(expected, found, strict=True))
    extra, members = sum(map(len, found)) - sum(map(len, expected)), sum(len(SETS[r]) for r in rows.tolist() if r >= 0)
    assert extra <= 0.1 * members
    assert any(expected) or n < 17


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_residual_is_added_in_fp32(make_site, random_tokens, dtype) -> None:
    site, rows = make_site(64, 40, SETS, bias=-1.5), torch.zeros(4, dtype=torch.int32)
    x, residual, candidates = (
        random_tokens(4, 64, dtype=dtype),
        random_tokens(4, 64, seed=2, dtype=dtype),
        poisoned(4, 40),
    )
    detect(x, rows, site, candidates, residual)
    found, expected = lists(candidates), exact(x, rows, site, residual)
    assert all(set(e) <= set(f) for e, f in zip(expected, found, strict=True))
    assert any(expected)
    assert found != exact(x, rows, site)


@pytest.mark.parametrize("width", [31, 576, 2048])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e12])
@pytest.mark.parametrize("aligned", [False, True])
def test_nothing_is_missed_however_near_the_edge(random_tokens, on_the_edge, width, size, aligned) -> None:
    """Scores by one step over the gate, of operands that are cut to TF32; aligned, each cut lowers the product."""
    x = random_tokens(40, width)
    site = on_the_edge(x * size, x if aligned else random_tokens(40, width, seed=2))
    rows, candidates = torch.arange(40, dtype=torch.int32), poisoned(40, 1)
    detect(x * size, rows, site, candidates)
    assert candidates.count.tolist() == [1] * 40
    assert candidates.found.tolist() == [[0]] * 40


def test_the_margin_and_its_widening_are_needed(random_tokens, on_the_edge, monkeypatch) -> None:
    """The test above can fail: without them the same edges are missed."""
    from kif_kernels.detect import triton

    x, rows, candidates = random_tokens(40, 576), torch.arange(40, dtype=torch.int32), poisoned(40, 1)
    monkeypatch.setattr(triton, "widening", lambda *_: 1.0)
    detect(x, rows, on_the_edge(x, x), candidates)
    assert candidates.count.sum() == 0
    site = on_the_edge(x, random_tokens(40, 576, seed=2))
    site.margin.zero_()
    detect(x, rows, site, candidates)
    assert candidates.count.sum() < 30


@pytest.mark.parametrize("edge", [0, 15, 16, 31, 32])
def test_hits_at_the_edges_of_tiles(make_site, monkeypatch, edge) -> None:
    """33 tokens and 33 signatures in tiles of 16, on each edge one pair that fires."""
    config = {"BLOCK_N": 16, "BLOCK_S": 16, "BLOCK_D": 16, "PRECISION": "tf32", "num_warps": 1}
    monkeypatch.setattr(tuned, "tile_config", lambda *_: config)
    site, candidates = make_site(20, 33, [list(range(33))], bias=-9.0, free=0), poisoned(33, 2)
    site.bias[edge] = -0.5
    site.write_screen(slice(0, 33))
    x = -site.detector[edge].repeat(33, 1)
    x[edge] *= -1
    detect(x, torch.zeros(33, dtype=torch.int32), site, candidates)
    assert lists(candidates) == [[edge] if n == edge else [] for n in range(33)]


def test_buffers_serve_again_and_again(make_site, random_tokens, monkeypatch) -> None:
    """Steps of other sizes and tiles, one after another, as at a server's sites; what the kernel works in stays 0."""
    site, candidates = make_site(64, 40, SETS, bias=-1.0), poisoned(40, 40)
    for n, block in ((40, 16), (3, 32), (33, 16), (40, 16), (17, 32)):
        config = {"BLOCK_N": block, "BLOCK_S": 16, "BLOCK_D": 32, "PRECISION": "ieee", "num_warps": 1}
        monkeypatch.setattr(tuned, "tile_config", lambda *_, config=config: config)
        x, rows, mine = random_tokens(n, 64, seed=n), torch.arange(n, dtype=torch.int32) % 5 - 1, candidates.first(n)
        detect(x, rows, site, mine)
        assert lists(mine) == exact(x, rows, site)
        assert not candidates.work.any()


def test_a_site_without_signatures_lists_none(random_tokens) -> None:
    site, candidates = SiteTensors.empty(width=64, signatures=0, rank=1, rows=1, set_length=1), poisoned(3, 4)
    detect(random_tokens(3, 64), torch.zeros(3, dtype=torch.int32), site, candidates)
    assert candidates.count.tolist() == [0, 0, 0]


def test_a_list_that_is_too_short_overflows(make_site, random_tokens) -> None:
    site, rows, candidates = make_site(64, 40, SETS, bias=0.0), torch.zeros(5, dtype=torch.int32), poisoned(5, 4)
    x = random_tokens(5, 64)
    detect(x, rows, site, candidates)
    assert all(len(e) > 4 for e in exact(x, rows, site))
    assert lists(candidates) == [None] * 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20, 3e38])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_tokens_that_a_product_cannot_judge_keep_their_whole_set(make_site, random_tokens, bad) -> None:
    site, rows, candidates = make_site(64, 40, SETS, bias=-50.0), torch.ones(3, dtype=torch.int32), poisoned(3, 40)
    x = random_tokens(3, 64)
    x[1, 5] = bad
    detect(x, rows, site, candidates)
    assert lists(candidates) == [[], [0, 1, 2, 3], []]


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)], ids=str)
def test_no_tokens_is_no_work(make_site, shape) -> None:
    detect(torch.empty(shape), torch.zeros(shape[0], dtype=torch.int32), make_site(64, 5, [[0]]), poisoned(0, 4))


def test_batches_strides_and_tiles_of_any_size(make_site, random_tokens, monkeypatch) -> None:
    site, rows = make_site(64, 40, SETS, bias=-1.0), torch.tensor([1, -1, 3], dtype=torch.int32)
    x = random_tokens(3, 7, 96)[:, :, 10:74]
    found = []
    for tokens, slots in ((16, 16), (32, 64)):
        config = {"BLOCK_N": tokens, "BLOCK_S": slots, "BLOCK_D": 32, "PRECISION": "ieee", "num_warps": 1}
        monkeypatch.setattr(tuned, "tile_config", lambda *_, config=config: config)
        candidates = poisoned(21, 40)
        detect(x, rows, site, candidates)
        found.append(lists(candidates))
    assert found[0] == found[1] == exact(x, rows, site)
    assert any(found[0])
