"""detect lists all that fires, or says that it did not fit; suppression on the lists alone gives the same bits."""

from dataclasses import replace

import pytest
import torch

from kif_kernels import Candidates, KernelError, detect, scores, suppress_
from kif_kernels.detect import reference

SETS = [list(range(40)), [17, 3, 30], [], [39, 0]]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_rows(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32) % 5 - 1


def listed(candidates: Candidates) -> list[set[int] | None]:
    """The places listed for each token, None where they did not fit."""
    limit = candidates.found.shape[1]
    places = [row[:count].tolist() for row, count in zip(candidates.found, candidates.count.tolist(), strict=True)]
    assert all(len(set(p)) == len(p) for p in places)
    return [set(p) if n <= limit else None for p, n in zip(places, candidates.count.tolist(), strict=True)]


def firing(x: torch.Tensor, rows: torch.Tensor, site) -> list[set[int]]:
    over = scores(x, site) > torch.where(site.k.isinf(), 0.0, site.tau - 6.93 / site.k)  # ln 1023 = 6.9305
    sets = [site.sets[row].tolist() if row >= 0 else [] for row in rows.tolist()]
    return [{place for place, s in enumerate(slots) if s >= 0 and over[n, s]} for n, slots in enumerate(sets)]


@DTYPES
@pytest.mark.parametrize("gate", ["hard", "mixed"])
def test_everything_that_fires_is_listed_and_little_else(make_site, dtype, gate) -> None:
    site = make_site(96, 40, SETS, gate=gate, bias=-1.2)
    x, rows = tokens(100, 96).to(dtype), some_rows(100)
    candidates = Candidates.empty(100, limit=40)
    candidates.count.fill_(9)  # what was in the buffers does not matter
    candidates.found.fill_(-77)
    detect(x, rows, site, candidates)
    found, fires = listed(candidates), firing(x, rows, site)
    assert all(f is not None and f >= g for f, g in zip(found, fires, strict=True))
    assert 50 < sum(map(len, fires)) <= sum(map(len, found)) <= sum(map(len, fires)) + 2


@DTYPES
@pytest.mark.parametrize("limit", [1, 3, 40])
@pytest.mark.parametrize("bias", [-50.0, -1.2, 50.0], ids=["none fires", "some fire", "all fire"])
def test_suppression_on_the_lists_alone_gives_the_same_bits(make_site, dtype, limit, bias) -> None:
    site = make_site(96, 40, SETS, gate="mixed", bias=bias)
    x, rows = tokens(50, 96).to(dtype), some_rows(50)
    candidates = Candidates.empty(50, limit=limit)
    detect(x, rows, site, candidates)
    assert (candidates.count > limit).any() == (bias > -50 and limit < 40)
    plain, alone = x.clone(), x.clone()
    hits, plain_hits = torch.zeros(2, 50, 20, dtype=torch.bool)
    suppress_(plain, rows, site, plain_hits)
    suppress_(alone, rows, site, hits, candidates)
    assert torch.equal(alone, plain)
    assert torch.equal(hits, plain_hits)
    assert torch.equal(plain, x) == (bias == -50)


def test_suppression_reads_the_lists_and_nothing_else(make_site) -> None:
    """With empty lists nothing is looked at, so the tests above can fail."""
    site, x = make_site(96, 40, SETS, bias=50.0), tokens(8, 96)
    before = x.clone()
    suppress_(x, torch.zeros(8, dtype=torch.int32), site, None, Candidates.empty(8))
    assert torch.equal(x, before)


@DTYPES
def test_the_reference_lists_what_fires_and_no_more(make_site, dtype) -> None:
    site = make_site(96, 40, SETS, gate="mixed", bias=-1.2)
    x, rows, candidates = tokens(30, 96).to(dtype), some_rows(30), Candidates.empty(30, limit=40)
    reference.detect(x, rows, site, candidates)
    assert listed(candidates) == firing(x, rows, site)


def test_a_residual_is_added_in_fp32(make_site) -> None:
    site, rows = make_site(96, 40, SETS, bias=-1.2), torch.zeros(2, dtype=torch.int32)
    x, residual = tokens(2, 15, 96).bfloat16(), (3 * tokens(2, 15, 96, seed=2)).bfloat16()
    candidates = Candidates.empty(30, limit=40)
    detect(x, rows, site, candidates, residual=residual)
    fires = firing((x.float() + residual.float()).reshape(30, 96), rows.repeat_interleave(15), site)
    assert fires != firing((x + residual).reshape(30, 96), rows.repeat_interleave(15), site)
    assert all(f is not None and f >= g for f, g in zip(listed(candidates), fires, strict=True))


@pytest.mark.parametrize("count", [0, 1, 17])
def test_any_number_of_tokens_and_strides(make_site, count) -> None:
    site, rows = make_site(33, 40, SETS, bias=-1.0), some_rows(count)
    wide = tokens(count, 66)
    candidates = Candidates.empty(20, limit=40).first(count)
    detect(wide[:, ::2], rows, site, candidates)
    found = [f or set() for f in listed(candidates)]
    assert all(f >= g for f, g in zip(found, firing(wide[:, ::2], rows, site), strict=True))


def test_nan_and_infinite_tokens_list_nothing(make_site) -> None:
    site, x = make_site(96, 40, SETS, bias=50.0), tokens(3, 96)
    x[0, 5], x[1, 7] = torch.nan, torch.inf
    candidates = Candidates.empty(3, limit=40)
    detect(x, torch.zeros(3, dtype=torch.int32), site, candidates)
    assert candidates.count.tolist() == [0, 0, 40]


def test_it_is_registered_soundly(make_site) -> None:
    site, candidates = make_site(16, 5, [[0, 1, 2, 3, 4]]), Candidates.empty(4)
    arguments = (torch.zeros(4, dtype=torch.int32), *site.tensors, candidates.count, candidates.found, candidates.work)
    torch.library.opcheck(torch.ops.kif.detect.default, (tokens(4, 16), None, *arguments))
    torch.library.opcheck(torch.ops.kif.detect.default, (tokens(4, 16), tokens(4, 16, seed=2), *arguments))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(4, 17)}, "16 wide"),
        ({"rows": torch.zeros(4)}, r"expected torch.int32 \[4\]"),
        ({"residual": torch.zeros(4, 16).half()}, "residual is torch.float16"),
        ({"candidates": Candidates.empty(5)}, r"count .*\[5\].*expected.*\[4\]"),
        ({"candidates": Candidates(torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32))}, "found"),
        ({"candidates": Candidates(torch.zeros(4), torch.zeros(4, 2))}, "float32"),
        ({"candidates": replace(Candidates.empty(4), work=None)}, "no buffer to work in"),
        ({"candidates": replace(Candidates.empty(4), work=torch.zeros(3, 2))}, r"candidates.work is .*\[3, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused(make_site, change, says) -> None:
    given = {"x": tokens(4, 16), "rows": torch.zeros(4, dtype=torch.int32), "candidates": Candidates.empty(4)} | change
    with pytest.raises(KernelError, match=says):
        detect(given["x"], given["rows"], make_site(16, 5, [[0]]), given["candidates"], residual=given.get("residual"))
