"""suppress_ in graphs and under autograd: registered operators, torch.compile, gradients, autocast."""

import shutil

import pytest
import torch

from kif_kernels import suppress, suppress_
from kif_kernels.suppress import reference

SETS = [[0, 1, 2, 3, 4], [3, 1], []]
ROWS = torch.tensor([0, 1, -1, 2], dtype=torch.int32)


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.slow
def test_the_operators_are_registered_soundly(make_site) -> None:
    site = make_site(16, 5, SETS, gate="mixed")
    x, hits = tokens(4, 16), torch.zeros(4, 3, dtype=torch.bool)
    op, batch, nothing = torch.ops.kif.suppress_.default, x.reshape(4, 1, 16).clone(), (None, None, None)
    torch.library.opcheck(op, (x.clone(), ROWS, *site.tensors, hits, None, None))
    torch.library.opcheck(op, (batch, ROWS, *site.tensors, *nothing))
    torch.library.opcheck(torch.ops.kif.suppress.default, (x.clone().requires_grad_(), ROWS, *site.tensors))
    torch.library.opcheck(torch.ops.kif.scores.default, (x, site.detector, site.bias))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_graph_is_whole_and_equal(make_site, backend) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    site = make_site(32, 5, SETS, gate="mixed")

    def block(x: torch.Tensor, rows: torch.Tensor, hits: torch.Tensor) -> torch.Tensor:
        y = x * 1.5
        suppress_(y, rows, site, hits)
        return y + 1

    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=False)
    hits, expected_hits = torch.zeros(2, 12, 3, dtype=torch.bool)
    x = tokens(4, 3, 32)
    with torch.no_grad():
        assert torch.equal(compiled(x, ROWS, hits), block(x, ROWS, expected_hits))
        assert torch.equal(hits, expected_hits)
        assert hits.any()
        site.strength.zero_()  # the graph reads the site's tensors when it runs, it does not bake them in
        assert torch.equal(compiled(x, ROWS, hits), x * 1.5 + 1)


def test_a_graph_for_any_length_serves_every_length(make_site) -> None:
    site = make_site(32, 5, SETS)

    def block(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        suppress_(x, rows, site)
        return x * 2

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for length in (3, 5, 17):
            x = tokens(4, length, 32)
            assert torch.equal(compiled(x.clone(), ROWS), block(x.clone(), ROWS))


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_the_gradient_is_right(make_site, gate) -> None:
    site = make_site(6, 5, SETS, gate=gate, rank=2)
    x = tokens(4, 6, dtype=torch.float64).requires_grad_()
    assert not torch.equal(suppress(x, ROWS, site), x)
    assert torch.autograd.gradcheck(lambda t: suppress(t, ROWS, site), (x,))
    assert torch.autograd.gradcheck(lambda t: reference.suppress(t, ROWS, site), (x,))


def test_the_gradient_reaches_batches_and_passes_untouched_rows_through(make_site) -> None:
    site = make_site(16, 5, SETS, gate="soft")
    x = tokens(4, 3, 16).requires_grad_()
    out = suppress(x, ROWS, site)
    out.sum().backward()
    assert torch.equal(x.grad[2:], torch.ones(2, 3, 16))
    assert not torch.allclose(x.grad[0], torch.ones(3, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_out_of_place_gives_what_in_place_gives(make_site, dtype) -> None:
    site, x = make_site(16, 5, SETS, gate="mixed"), tokens(4, 16, dtype=dtype)
    before, ours = x.clone(), x.clone()
    out = suppress(x, ROWS, site)
    suppress_(ours, ROWS, site)
    assert torch.equal(out, ours)
    assert torch.equal(x, before)
    assert not torch.equal(out, x)


def test_autocast_and_inference_mode_change_nothing(make_site) -> None:
    site, x = make_site(576, 5, SETS, gate="mixed"), tokens(4, 576)
    expected, cast, inferred = x.clone(), x.clone(), x.clone()
    suppress_(expected, ROWS, site)
    with torch.autocast("cpu", torch.bfloat16):
        suppress_(cast, ROWS, site)
    with torch.inference_mode():
        suppress_(inferred, ROWS, site)
    assert torch.equal(cast, expected)
    assert torch.equal(inferred, expected)
    assert not torch.equal(x, expected)
