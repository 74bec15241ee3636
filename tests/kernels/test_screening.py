"""The screen never rules out what the fixed-order decision fires, however near the score is to the floor."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kif_kernels import SiteTensors, scores, suppress_
from kif_kernels.layout import LOG_1023, screening_margin, sketched
from kif_kernels.suppress import cpu_screen

INF = torch.tensor(inf)


SCREENS = ("fp32", "8 bits")


@contextmanager
def screening(how: str) -> Iterator[None]:
    """Screen in fp32 or in 8 bits, however many detectors there are."""
    if how == "8 bits" and not cpu_screen.exact_in_8_bits():
        pytest.skip("this machine does not multiply in 8 bits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_screen, "_many", lambda *_: how == "8 bits")
        yield


@pytest.fixture(params=SCREENS)
def screen(request: pytest.FixtureRequest) -> Iterator[str]:
    with screening(request.param):
        yield request.param


def on_the_edge(x: torch.Tensor, detector: torch.Tensor, k: float | None) -> SiteTensors:
    """A site where token n of x [N, D] has set n, of one signature whose score there is the lowest that still fires."""
    n, width = x.shape
    site = SiteTensors.empty(width=width, signatures=n, rank=1, rows=n, set_length=1)
    site.detector.copy_(detector)
    site.bias.zero_()
    score = scores(x, site).diagonal()
    if k is None:
        site.bias.copy_(torch.nextafter(-score, INF))  # the sum is exact, and just over 0
    else:
        site.k.fill_(k)
        tau = score + LOG_1023 / k + 1e-4 * (score.abs() + 7 / k)
        fires = torch.zeros(n, dtype=torch.bool)
        while not fires.all():  # lower τ by single steps until the gate just opens
            tau = torch.where(
                fires, tau, (tau - score).mul(1 - 2.0**-22).add(score).minimum(torch.nextafter(tau, -INF))
            )
            fires = site.k * (score - tau) >= -LOG_1023
        site.tau.copy_(tau)
    site.basis[:, 0, 0], site.strength[:] = 1.0, 1.0
    site.target[:, 0] = x[:, 0] + x[:, 0].abs() + 1  # a token on which its signature fires cannot stay as it was
    site.owner.copy_(torch.arange(n))
    site.used.fill_(n)
    for slot in range(n):
        site.write_set(slot, [slot])
    site.write_screen(slice(None))
    return site


def missed(x: torch.Tensor, site: SiteTensors) -> int:
    """How many tokens are left as they are, all at once and each alone."""
    rows, together, alone = torch.arange(len(x), dtype=torch.int32), x.clone(), x.clone()
    suppress_(together, rows, site)
    for n in range(len(x)):
        suppress_(alone[n : n + 1], rows[n : n + 1], site)
    return int((together == x).all(1).sum() + (alone == x).all(1).sum())


@pytest.fixture(params=["highest", "high", "medium"])
def precision(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("how", SCREENS)
@settings(max_examples=25, deadline=None)
@given(
    width=st.sampled_from([1, 2, 3, 31, 32, 64, 100, 576, 1024, 2048]),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e4, 1e16, 1e30]),
    weight=st.sampled_from([1e-6, 1.0, 1e6]),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    k=st.sampled_from([None, 0.05, 1.6, 40.0]),
)
def test_nothing_that_fires_is_ruled_out(how, width, seed, size, weight, spread, k) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(24, width, generator=g) * torch.exp(spread * torch.randn(24, width, generator=g)) * size
    detector = torch.randn(24, width, generator=g) * torch.exp(spread * torch.randn(24, width, generator=g)) * weight
    with screening(how):
        assert missed(x, on_the_edge(x, detector, k)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("k", [None, 1.6], ids=["hard", "soft"])
def test_it_holds_where_fp32_products_are_allowed_to_be_coarse(screen, precision, k) -> None:
    x, detector = torch.randn(2, 200, 576, generator=torch.Generator().manual_seed(1))
    assert missed(x, on_the_edge(x, detector, k)) == 0


def test_it_holds_where_torch_does_not_tell_how_coarse_they_may_be(screen) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        x, detector = torch.randn(2, 50, 576, generator=torch.Generator().manual_seed(1))
        assert missed(x, on_the_edge(x, detector, None)) == 0
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"


def test_it_holds_under_autocast(screen) -> None:
    x, detector = torch.randn(2, 200, 576, generator=torch.Generator().manual_seed(1))
    site = on_the_edge(x, detector, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert missed(x, site) == 0


def test_the_margin_is_needed(screen) -> None:
    """The tests above can fail: without the margin the same edge cases are missed, by the last word of 8 bits too."""
    x, detector = torch.randn(2, 200, 576, generator=torch.Generator().manual_seed(1))
    site = on_the_edge(x, detector, None)
    site.margin.zero_()
    assert missed(x, site) > 100


@pytest.mark.parametrize("term", ["length", "rest"])
def test_both_parts_of_the_bound_in_8_bits_are_needed(term) -> None:
    """Without either, edge cases are missed: those whose token, or whose detector, was rounded the wrong way.

    (The edge is fp32's, whose margin is far narrower, and it has its say on what 8 bits let through.)
    """
    g = torch.Generator().manual_seed(1)
    coarse, fine = (t.where(torch.rand(200, 576, generator=g) < 0.02, t / 50) for t in torch.randn(2, 200, 576))
    x, detector = (coarse, fine.sign()) if term == "length" else (coarse.sign(), fine)
    site = on_the_edge(x, detector, None)
    with screening("8 bits"):
        assert missed(x, site) == 0
        getattr(site, term).zero_()
        assert missed(x, site) > 50


def test_the_margin_rules_out_nearly_everything_else() -> None:
    """As tight as 1e-4 of what a score can be, so that candidates that do not fire stay rare."""
    detector = torch.randn(3, 576, generator=torch.Generator().manual_seed(1))
    margin = screening_margin(detector, torch.zeros(3), torch.zeros(3), torch.full((3,), inf))
    assert (margin < 1e-4 * detector.norm(dim=1) * 24).all()
    assert (margin > 5e-5 * detector.norm(dim=1) * 24).all()


def test_8_bits_rule_out_nearly_everything_else_and_fp32_the_rest(make_site, monkeypatch) -> None:
    """Of random scores, N(0, 1), under a threshold of 4 they let through what is over about 3.6; the fp32 product that
    follows lets through what is over 4, to within its margin.
    """
    site = make_site(576, 500, [range(500)], bias=-4.0)
    x, detector = torch.randn(702, 576, generator=torch.Generator().manual_seed(1)).split([200, 502])
    site.detector.copy_(torch.nn.functional.normalize(detector))
    site.write_screen(slice(0, 500))
    rows = torch.zeros(200, dtype=torch.int32)
    with screening("8 bits"):
        in_the_end = len(cpu_screen.may_fire(x, rows, rows, site).token)
        monkeypatch.setattr(cpu_screen._Sketch, "_refined", lambda self, v, above: above)
        let_through = len(cpu_screen.may_fire(x, rows, rows, site).token)
    found = scores(x, site)
    assert (found > 0).sum() <= in_the_end <= (found > -0.01).sum()
    assert (found > -0.1).sum() < let_through < (found > -0.5).sum()


@pytest.mark.parametrize(("tokens", "block"), [(512, 1), (16, 16 * 33), (7, 7 * 500), (1, 499)])
def test_blocks_of_any_size_find_the_same_pairs(make_site, monkeypatch, tokens, block) -> None:
    """Blocks of one detector, too: there torch might take it for its transpose."""
    site = make_site(64, 500, [range(500)], bias=-2.5)
    x, rows = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)), torch.zeros(40, dtype=torch.int32)
    with screening("8 bits"):
        whole = cpu_screen.may_fire(x, rows, rows, site)
        monkeypatch.setattr(cpu_screen, "SKETCH_TOKENS", tokens)
        monkeypatch.setattr(cpu_screen, "BLOCK", block)
        parts = cpu_screen.may_fire(x, rows, rows, site)
    assert torch.equal(parts.token, whole.token)
    assert len(whole.token) > 100
    assert set(zip(*(t.tolist() for t in parts), strict=True)) == set(zip(*(t.tolist() for t in whole), strict=True))


def test_a_set_of_few_among_many_is_screened_by_its_own_detectors(make_site, screen) -> None:
    site = make_site(64, 500, [range(3, 500, 4)], bias=-2.5)
    x, rows = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)), torch.zeros(40, dtype=torch.int32)
    found = set(zip(*(t.tolist() for t in cpu_screen.may_fire(x, rows, rows, site)), strict=True))
    fires = {(n, s) for n, s in (scores(x, site) > 0).nonzero().tolist() if s % 4 == 3 and s < 500}
    assert fires <= found
    assert len(fires) > 20
    assert len(found) <= len(fires) + 2


def test_a_sketch_is_the_detector_to_within_what_it_says() -> None:
    detector = torch.randn(50, 300, generator=torch.Generator().manual_seed(1)) * torch.logspace(-20, 15, 50)[:, None]
    detector[7] = 0
    q, step, length, rest = sketched(detector)
    left = detector.double() - step.double()[:, None] * q.double()
    assert (left.norm(dim=1) * 300**0.5 <= rest).all()
    assert (q.double().norm(dim=1) <= length).all()
    assert (rest[:7] < 0.02 * detector[:7].norm(dim=1) * 300**0.5).all()
