"""On a real GPU the operators give the CPU's bits, in captured graphs too, and never wait for the device."""

import pytest
import torch
from torch import Tensor

from kif_kernels import Candidates, SiteTensors, add_norm_suppress_, detect, suppress, suppress_

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
SETS = [list(range(40)), [3, 17, 30], []]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(site: SiteTensors) -> SiteTensors:
    return SiteTensors(*(t.cuda() for t in site.tensors))


def tokens(n: int, width: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x, (torch.arange(n, dtype=torch.int32) + 1) % 4 - 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 576, 4096, 5120])
@pytest.mark.parametrize("n", [1, 17, 300])
@pytest.mark.parametrize("listed", [False, True])
def test_suppress_has_the_bits_of_the_cpu(make_site, dtype, width, n, listed) -> None:
    site, (x, rows) = make_site(width, 40, SETS, bias=-1.5), tokens(n, width, dtype)
    there, device_rows, device_site = x.cuda(), rows.cuda(), on_gpu(site)
    hits, device_hits = torch.zeros(n, 20, dtype=torch.bool), torch.zeros(n, 20, dtype=torch.bool, device="cuda")
    candidates = Candidates.empty(n, limit=4, device="cuda") if listed else None
    if candidates is not None:
        detect(there, device_rows, device_site, candidates)
        assert not candidates.work.any()
    suppress_(there, device_rows, device_site, device_hits, candidates)
    suppress_(x, rows, site, hits)
    assert torch.equal(there.cpu(), x)
    assert torch.equal(device_hits.cpu(), hits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [576, 4096])
def test_the_fused_operator_has_the_residual_of_the_cpu(make_site, dtype, width) -> None:
    site, (hidden, rows), (residual, _) = (
        make_site(width, 40, SETS, bias=-1.5),
        *(tokens(50, width, dtype, s) for s in (1, 2)),
    )
    weight = torch.ones(width, dtype=dtype)
    there = hidden.cuda(), residual.cuda()
    add_norm_suppress_(*there, rows.cuda(), on_gpu(site), weight.cuda(), 1e-5)
    add_norm_suppress_(hidden, residual, rows, site, weight, 1e-5)
    assert torch.equal(there[1].cpu(), residual)
    assert torch.allclose(there[0].cpu(), hidden, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_the_gradient_is_that_of_the_cpu(make_site) -> None:
    site, (x, rows) = make_site(576, 40, SETS, gate="soft", bias=-1.5), tokens(20, 576, torch.float32)
    gradients = []
    for device, bank in (("cpu", site), ("cuda", on_gpu(site))):
        leaf = x.to(device).requires_grad_()
        suppress(leaf, rows.to(device), bank).square().sum().backward()
        gradients.append(leaf.grad.cpu())
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)


def test_a_captured_graph_replays_without_waiting(make_site) -> None:
    site, (x, rows) = on_gpu(make_site(576, 40, SETS, bias=-1.5)), tokens(50, 576, torch.bfloat16)
    hidden, residual, rows, weight = (
        x.cuda(),
        x.cuda(),
        rows.cuda(),
        torch.ones(576, dtype=torch.bfloat16, device="cuda"),
    )
    candidates, graph = Candidates.empty(50, device="cuda"), torch.cuda.CUDAGraph()

    def step() -> None:
        detect(hidden, rows, site, candidates, residual=residual)
        add_norm_suppress_(hidden, residual, rows, site, weight, 1e-5, candidates=candidates)

    step()  # compiles
    hidden.copy_(x), residual.copy_(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = hidden.clone(), residual.clone()
    with torch.cuda.graph(graph):
        step()
    hidden.copy_(x), residual.copy_(x)
    graph.replay()
    assert torch.equal(hidden, expected[0])
    assert torch.equal(residual, expected[1])
