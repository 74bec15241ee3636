"""What happens to a token depends on it and its capsule set alone, bit for bit."""

from collections.abc import Iterator

import pytest
import torch

from kif_kernels import scores, suppress_

SETS = [list(range(40)), [3, 17, 30], []]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def alone(x: torch.Tensor, rows: torch.Tensor, site) -> torch.Tensor:
    out = x.clone()
    for n in range(len(x)):
        suppress_(out[n : n + 1], rows[n : n + 1], site)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_token_gets_the_same_bits_in_any_company(make_site, one_thread, dtype) -> None:
    site = make_site(576, 40, SETS, gate="mixed", bias=-1.0)
    crowd = torch.randn(1000, 576, generator=torch.Generator().manual_seed(5)).to(dtype)
    rows = torch.arange(1000, dtype=torch.int32) % 4 - 1
    mine = alone(crowd[:6], rows[:6], site)
    assert not torch.equal(mine, crowd[:6])
    for size in (7, 64, 1000):
        for place in (0, size - 6):
            order = torch.arange(size).roll(place)  # the six come at `place`
            together = crowd[order]
            suppress_(together, rows[order], site)
            assert torch.equal(together[place : place + 6], mine), (size, place)


def test_threads_do_not_matter(make_site, two_threads) -> None:
    """Two threads split a thousand tokens where one thread would not; few fire, which keeps this quick."""
    site = make_site(576, 40, SETS, gate="mixed", bias=-2.5)
    crowd, rows = (
        torch.randn(1000, 576, generator=torch.Generator().manual_seed(5)),
        torch.zeros(1000, dtype=torch.int32),
    )
    together = crowd.clone()
    suppress_(together, rows, site)
    torch.set_num_threads(1)
    some = [0, 1, 454, 455, 456, 499, 500, 998, 999]
    assert torch.equal(together[some], alone(crowd[some], rows[some], site))
    assert not torch.equal(together[some], crowd[some])


def test_a_soft_weight_has_the_same_bits_in_any_company(make_site) -> None:
    """A vectorised exp rounds otherwise in the last few values of a tensor; a far target shows the last bit."""
    site, rows = make_site(16, 1, [[0]], gate="soft", bias=0.5), torch.zeros(203, dtype=torch.int32)
    site.target.mul_(1e6)
    x = torch.randn(203, 16, generator=torch.Generator().manual_seed(6))
    together = x.clone()
    suppress_(together, rows, site)
    assert torch.equal(together, alone(x, rows, site))


def test_a_score_has_the_same_bits_in_any_company(make_site) -> None:
    site = make_site(576, 40, SETS)
    x = torch.randn(100, 576, generator=torch.Generator().manual_seed(6))
    together = scores(x, site)
    assert all(torch.equal(scores(x[n : n + 1], site)[0], together[n]) for n in (0, 1, 50, 99))


def test_padding_and_chunks_of_a_prompt_do_not_matter(make_site) -> None:
    site = make_site(64, 40, SETS, gate="mixed", bias=-1.0)
    x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(7))
    rows = torch.tensor([0, 1], dtype=torch.int32)
    whole, pieces = x.clone(), x.clone()
    suppress_(whole, rows, site)
    for start, stop in ((0, 1), (1, 14), (14, 50)):
        suppress_(pieces[:, start:stop], rows, site)
    padded = torch.cat([torch.zeros(2, 9, 64), x], 1)
    suppress_(padded, rows, site)
    assert torch.equal(pieces, whole)
    assert torch.equal(padded[:, 9:], whole)


def test_room_left_in_the_site_does_not_matter(make_site) -> None:
    small, large = (make_site(64, 40, SETS, bias=-1.0, free=free) for free in (0, 300))
    x, rows = torch.randn(30, 64, generator=torch.Generator().manual_seed(8)), torch.zeros(30, dtype=torch.int32)
    first, second = x.clone(), x.clone()
    suppress_(first, rows, small)
    suppress_(second, rows, large)
    assert torch.equal(first, second)
    assert not torch.equal(first, x)
