"""What suppress_ costs on the CPU: tokens at once × signatures at the site × whether anything fires.

    pytest bench/bench_operator.py --benchmark-columns=min,median,max,rounds

Width 576. Tokens 1 is a decoding step. "empty" is a request whose capsule set names nothing at the site. "few" fires
one signature on one token in a hundred, and at least on one. Times are of one call, at one site.
"""

import pytest
import torch

from kif_kernels import SiteTensors, suppress_

WIDTH, RANK = 576, 8
BIAS = -12.0  # a random token scores about N(0, 1); one along the detector scores √576 = 24


def make_site(signatures: int) -> SiteTensors:
    g = torch.Generator().manual_seed(0)
    slots = max(1, signatures)
    site = SiteTensors.empty(width=WIDTH, signatures=slots, rank=RANK, rows=1, set_length=slots)
    if signatures:
        site.detector.copy_(torch.nn.functional.normalize(torch.randn(slots, WIDTH, generator=g), dim=1))
        site.bias.fill_(BIAS)
        site.basis.copy_(torch.linalg.qr(torch.randn(slots, WIDTH, RANK, generator=g)).Q.mT)
        site.strength.fill_(1.0)
        site.owner.copy_(torch.arange(slots))
        site.used.fill_(slots)
        site.write_set(0, range(slots))
        site.write_screen(slice(None))
    return site


def make_tokens(count: int, site: SiteTensors, firing: str) -> torch.Tensor:
    x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1))
    if firing == "few":
        for n in range(0, count, 100):
            x[n] = site.detector[n % len(site.detector)] * WIDTH**0.5
    return x


@pytest.mark.parametrize("tokens", [1, 256, 4096])
@pytest.mark.parametrize(
    ("signatures", "firing"),
    [(0, "empty"), (1, "none"), (1, "few"), (16, "none"), (16, "few"), (1000, "none"), (1000, "few"), (10000, "none")],
)
def test_suppress(benchmark, tokens: int, signatures: int, firing: str) -> None:
    site = make_site(signatures)
    x, rows = make_tokens(tokens, site, firing), torch.zeros(tokens, dtype=torch.int32)
    hits = torch.zeros(tokens, len(site.detector), dtype=torch.bool)
    suppress_(x.clone(), rows, site, hits)
    assert hits.any(1).sum() == (-(-tokens // 100) if firing == "few" else 0)
    with torch.inference_mode():
        benchmark(suppress_, x, rows, site)
