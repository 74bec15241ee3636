"""The gradient kernel against automatic differentiation of the reference, in float64."""

import pytest
import torch
from torch import Tensor

from kif_kernels import SiteTensors
from kif_kernels.suppress import reference
from kif_kernels.suppress.triton_backward import suppress_backward

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of branches that are not taken

SETS = [[0, 1, 2, 3, 4], [3], [4, 0, 2], []]
DTYPES = [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float32, torch.float16))]


def rows_for(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.int32) + 1) % 5 - 1


def in_float64(grad: Tensor, x: Tensor, rows: Tensor, site: SiteTensors) -> Tensor:
    return reference.suppress_backward(grad.double(), x.double(), rows, site)


def check(x: Tensor, grad: Tensor, rows: Tensor, site: SiteTensors) -> Tensor:
    """Error at most twice that of the reference's own gradient in this dtype, plus a rounding of the largest entry."""
    ours, theirs, exact = (f(grad, x, rows, site) for f in (suppress_backward, reference.suppress_backward, in_float64))
    assert ours.dtype == x.dtype
    assert ours.is_contiguous()
    error, allowed = ((t.double() - exact).abs().max() for t in (ours, theirs))
    assert error <= 2 * allowed + torch.finfo(x.dtype).eps * exact.abs().max()
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["hard", "soft", "mixed"])
def test_it_is_the_references_gradient(make_site, random_tokens, dtype, gate) -> None:
    site, rows = make_site(48, 5, SETS, gate=gate, bias=0.3), rows_for(5)
    x, grad = random_tokens(5, 48, dtype=dtype), random_tokens(5, 48, seed=2, dtype=dtype)
    assert not torch.equal(check(x, grad, rows, site), grad)


@pytest.mark.parametrize(
    ("width", "rank"), [(1, 1), (37, 3), *(pytest.param(*s, marks=pytest.mark.slow) for s in [(576, 5), (4096, 1)])]
)
def test_widths_and_ranks(make_site, random_tokens, width, rank) -> None:
    site, rows = make_site(width, 5, SETS, gate="soft", rank=rank), torch.zeros(2, dtype=torch.int32)
    check(random_tokens(2, width), random_tokens(2, width, seed=2), rows, site)


def test_untouched_tokens_pass_the_gradient_through(make_site, random_tokens) -> None:
    """No set, an empty set, and one whose gates stay shut; what comes out is fully written."""
    site, rows = make_site(48, 5, SETS, bias=-50.0), torch.tensor([-1, 3, 0], dtype=torch.int32)
    grad = random_tokens(3, 48, seed=2)
    assert torch.equal(suppress_backward(grad, random_tokens(3, 48), rows, site), grad)


def test_every_entry_is_written(make_site, random_tokens, monkeypatch) -> None:
    site, rows, x, grad = make_site(37, 5, SETS), rows_for(5), random_tokens(5, 37), random_tokens(5, 37, seed=2)
    expected, empty_like = suppress_backward(grad, x, rows, site), torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    assert torch.equal(suppress_backward(grad, x, rows, site), expected)


def test_batches_and_strides(make_site, random_tokens) -> None:
    site, rows = make_site(48, 5, SETS, gate="soft"), torch.tensor([1, -1], dtype=torch.int32)
    x, grad = random_tokens(2, 3, 96)[:, :, 30:78], random_tokens(2, 48, 3, seed=2).transpose(1, 2)
    flat = suppress_backward(grad.reshape(6, 48), x.reshape(6, 48), rows.repeat_interleave(3), site)
    assert torch.equal(suppress_backward(grad, x, rows, site), flat.reshape(2, 3, 48))


@pytest.mark.parametrize("size", [1e-3, 1e25])
def test_tiny_and_huge_tokens(make_site, random_tokens, size) -> None:
    """A target far below a huge token is out of its sight, and a soft gate lets through little."""
    site, rows = make_site(48, 5, SETS, gate="mixed", affine=False, bias=0.3), torch.zeros(2, dtype=torch.int32)
    check(random_tokens(2, 48) * size, random_tokens(2, 48, seed=2), rows, site)


def test_the_same_bits_in_any_company(make_site, random_tokens) -> None:
    site, rows = make_site(48, 5, SETS, gate="mixed"), rows_for(3)
    x, grad = random_tokens(3, 48), random_tokens(3, 48, seed=2)
    together = suppress_backward(grad, x, rows, site)
    for n in range(3):
        one = slice(n, n + 1)
        assert torch.equal(suppress_backward(grad[one], x[one], rows[one], site)[0], together[n])


@pytest.mark.parametrize("shape", [(0, 48), (3, 0, 48)], ids=str)
def test_no_tokens_is_no_work(make_site, shape) -> None:
    x, rows = torch.empty(shape), torch.zeros(shape[0], dtype=torch.int32)
    assert suppress_backward(x, x, rows, make_site(48, 5, SETS)).shape == shape
