"""What must hold of the kernels for any signatures: erasure in the mathematical sense, and a screen without misses."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kif_kernels import Candidates, SiteTensors
from kif_kernels.detect.triton import detect
from kif_kernels.suppress.triton import suppress_

few = settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
seeds = st.integers(0, 2**31)
widths = st.sampled_from([8, 17, 40])


def held_open(width: int, bases: list[Tensor], strength: float = 1.0) -> SiteTensors:
    """A site with one set of signatures that fire on everything, of these bases [r, D], with no target."""
    rank = max(b.shape[0] for b in bases)
    site = SiteTensors.empty(width=width, signatures=len(bases), rank=rank, rows=1, set_length=len(bases))
    for slot, basis in enumerate(bases):
        site.basis[slot, : basis.shape[0]] = basis
    site.bias.fill_(1.0)
    site.strength.fill_(strength)
    site.owner.zero_()
    site.used.fill_(len(bases))
    site.write_screen(slice(0, len(bases)))
    site.write_set(0, list(range(len(bases))))
    return site


def orthonormal(width: int, rank: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, rank, generator=torch.Generator().manual_seed(seed))).Q.mT


def done(x: Tensor, site: SiteTensors) -> Tensor:
    out = x.clone()
    suppress_(out, torch.zeros(len(x), dtype=torch.int32), site)
    return out


def tokens(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed + 1))


@few
@given(width=widths, seed=seeds, rank=st.integers(1, 4))
def test_once_is_enough(width, seed, rank) -> None:
    site, x = held_open(width, [orthonormal(width, rank, seed)]), tokens(2, width, seed)
    once = done(x, site)
    assert (done(once, site) - once).abs().max() <= 1e-6
    assert (once - x).abs().max() > 1e-3


@few
@given(width=widths, seed=seeds)
def test_orthogonal_signatures_need_one_pass_and_no_order(width, seed) -> None:
    basis, x = orthonormal(width, 4, seed), tokens(2, width, seed)
    site, turned = held_open(width, [basis[:2], basis[2:]]), held_open(width, [basis[2:], basis[:2]])
    once = done(x, site)
    assert (done(once, site) - once).abs().max() <= 1e-6
    assert (done(x, turned) - once).abs().max() <= 1e-6


@few
@given(width=st.sampled_from([17, 40]), seed=seeds, rank=st.integers(1, 3), strength=st.sampled_from([0.25, 1.0]))
def test_the_change_has_the_rank_of_the_basis(width, seed, rank, strength) -> None:
    x = tokens(4, width, seed)
    change = x - done(x, held_open(width, [orthonormal(width, rank, seed)], strength))
    values = torch.linalg.svdvals(change.double())
    assert values[rank - 1] > 1e-3
    assert values[rank] <= 1e-5


@few
@given(width=widths, seed=seeds, rank=st.integers(1, 4))
def test_the_target_is_reached_and_nothing_else_moves(width, seed, rank) -> None:
    basis, x = orthonormal(width, rank, seed), tokens(2, width, seed)
    site = held_open(width, [basis])
    site.target[0] = torch.randn(rank, generator=torch.Generator().manual_seed(seed + 2))
    out = done(x, site)
    assert (out @ basis.T - site.target[0]).abs().max() <= 4e-6
    others = torch.eye(width) - basis.T @ basis
    assert ((out - x) @ others).abs().max() <= 4e-6


@few
@given(width=widths, seed=seeds, strength=st.sampled_from([0.0, 0.5]))
def test_strength_is_the_share_removed(width, seed, strength) -> None:
    basis, x = orthonormal(width, 2, seed), tokens(2, width, seed)
    out = done(x, held_open(width, [basis], strength))
    assert (out @ basis.T - (1 - strength) * (x @ basis.T)).abs().max() <= 4e-6


@settings(few, max_examples=20)
@given(
    width=st.sampled_from([1, 3, 31, 100, 576]),
    seed=seeds,
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e4, 1e16, 1e30]),
    weight=st.sampled_from([1e-6, 1.0, 1e6]),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    aligned=st.booleans(),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_screen_misses_nothing_that_fires_by_one_step(
    on_the_edge, width, seed, size, weight, spread, aligned
) -> None:
    g = torch.Generator().manual_seed(seed)
    x, other, a, b = torch.randn(4, 20, width, generator=g)
    x = x * torch.exp(spread * a) * size
    detector = x / size * weight if aligned else other * torch.exp(spread * b) * weight
    candidates = Candidates.empty(20, limit=1)
    detect(x, torch.arange(20, dtype=torch.int32), on_the_edge(x, detector), candidates)
    assert candidates.count.tolist() == [1] * 20
