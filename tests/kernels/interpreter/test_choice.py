"""What the registered operators run on a GPU, called as the dispatcher calls it, on CPU tensors."""

from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kif_kernels import Candidates, add_norm_suppress
from kif_kernels.add_norm_suppress import triton as fused_kernels
from kif_kernels.detect import triton as detect_kernels
from kif_kernels.suppress import reference
from kif_kernels.suppress import triton as suppress_kernels

# the package's `suppress` and `detect` are functions
suppress, detect = import_module("kif_kernels.suppress"), import_module("kif_kernels.detect")
SETS = [[0, 1, 2, 3, 4], [3]]


@pytest.mark.parametrize(
    ("tokens", "listed", "kernel"),
    [(3, False, "suppress_kernel"), (64, False, "suppress_tile_kernel"), (64, True, "suppress_kernel")],
)
def test_suppress(make_site, random_tokens, launched, tokens, listed, kernel) -> None:
    site, x, rows = make_site(16, 5, SETS), random_tokens(tokens, 16), torch.ones(tokens, dtype=torch.int32)
    rows[3:] = -1
    expected, candidates = x.clone(), Candidates.empty(tokens)
    reference.suppress_(expected, rows, site)
    detect._detect_on_gpu(x, None, rows, *site.tensors, candidates.count, candidates.found, candidates.work)
    lists = (candidates.count, candidates.found) if listed else (None, None)
    suppress._suppress_gpu_(x, rows, *site.tensors, None, *lists)
    assert torch.equal(x, expected)
    assert launched == ["detect_kernel", kernel]


@pytest.mark.parametrize("name", ["add_norm_suppress_", "suppress_normed_"])
def test_the_fused_operators(make_site, random_tokens, launched, name) -> None:
    site, rows, weight = make_site(16, 5, SETS), torch.zeros(3, dtype=torch.int32), torch.ones(16)
    ours, theirs = ([random_tokens(3, 16), random_tokens(3, 16, seed=2)] for _ in range(2))
    add_norm_suppress._on_gpu(name, *ours, rows, *site.tensors, weight, 1e-5, False, None, None, None)
    getattr(add_norm_suppress.reference, name)(*theirs, rows, site, weight, 1e-5)
    assert torch.equal(ours[1], theirs[1])
    assert torch.allclose(ours[0], theirs[0], rtol=1e-6)
    assert launched == [f"{name}kernel"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_gradient(make_site, random_tokens, launched) -> None:
    site, rows = make_site(16, 5, SETS, gate="soft"), torch.zeros(1, dtype=torch.int32)
    x, grad = random_tokens(1, 16), random_tokens(1, 16, seed=2)
    ours = suppress._suppress_backward_gpu(grad, x, rows, *site.tensors)
    assert torch.allclose(ours, reference.suppress_backward(grad, x, rows, site), atol=1e-5)
    assert launched == ["suppress_backward_kernel"]


@pytest.fixture
def unwarned():
    suppress.kernels.cache_clear()
    suppress._warn_of_reference.cache_clear()


def test_float64_is_left_to_the_reference_with_a_warning(make_site, random_tokens, launched, unwarned) -> None:
    site, x, rows = make_site(16, 5, SETS), random_tokens(3, 16).double(), torch.zeros(3, dtype=torch.int32)
    expected = x.clone()
    reference.suppress_(expected, rows, site)
    with pytest.warns(UserWarning, match="no kernel for float64: its slow reference runs"):
        suppress._suppress_gpu_(x, rows, *site.tensors, None, None, None)
    assert torch.equal(x, expected)
    assert not launched


def test_tokens_that_no_program_can_hold_are_left_to_the_reference_with_a_warning(
    make_site, random_tokens, launched, unwarned
) -> None:
    site, rows = make_site(8193, 1, [[0]], rank=1, bias=9.0), torch.zeros(2, dtype=torch.int32)
    x, residual, weight = random_tokens(2, 8193), random_tokens(2, 8193, seed=2), torch.ones(8193)
    for call in (
        lambda: suppress._suppress_gpu_(x.clone(), rows, *site.tensors, None, None, None),
        lambda: suppress._suppress_backward_gpu(residual.bfloat16(), x.bfloat16(), rows, *site.tensors),
        lambda: add_norm_suppress._on_gpu(
            "add_norm_suppress_", x.clone(), residual, rows, *site.tensors, weight, 1e-5, False, None, None, None
        ),
    ):
        suppress._warn_of_reference.cache_clear()
        suppress.kernels.cache_clear()
        with pytest.warns(UserWarning, match="no kernel for tokens of over 8192 numbers"):
            call()
    expected = x.clone()
    reference.suppress_(expected, rows, site)
    suppress._suppress_gpu_(x, rows, *site.tensors, None, None, None)
    assert torch.equal(x, expected)
    assert not launched


def test_wide_gradients_in_fp32_are_left_to_the_reference_with_a_warning(
    make_site, random_tokens, launched, unwarned
) -> None:
    site, rows = make_site(4097, 1, [[0]], rank=1, gate="soft", bias=9.0), torch.zeros(1, dtype=torch.int32)
    x, grad = random_tokens(1, 4097), random_tokens(1, 4097, seed=2)
    with pytest.warns(UserWarning, match="no kernel for gradients in fp32 of over 4096 numbers"):
        ours = suppress._suppress_backward_gpu(grad, x, rows, *site.tensors)
    assert torch.equal(ours, reference.suppress_backward(grad, x, rows, site))
    assert not launched


def test_gradients_through_long_sets_are_left_to_the_reference_with_a_warning(
    make_site, random_tokens, launched, unwarned
) -> None:
    site, rows = make_site(16, 65, [list(range(65))], gate="soft"), torch.zeros(1, dtype=torch.int32)
    x, grad = random_tokens(1, 16), random_tokens(1, 16, seed=2)
    with pytest.warns(UserWarning, match="gradients through sets of over 64 signatures"):
        ours = suppress._suppress_backward_gpu(grad, x, rows, *site.tensors)
    assert torch.equal(ours, reference.suppress_backward(grad, x, rows, site))
    assert not launched


class Seen(TorchDispatchMode):
    """Remembers every torch operation that reaches a backend."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_step_neither_allocates_nor_reads_a_tensor(make_site, random_tokens, monkeypatch) -> None:
    """All that a step does besides launching is to look at `hits` as bytes."""

    class Nothing:
        def __getitem__(self, grid):
            return lambda *_, **__: None

    for module in (suppress_kernels, fused_kernels, detect_kernels):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Nothing())
    site, rows, weight = make_site(16, 5, SETS), torch.zeros(64, dtype=torch.int32), torch.ones(16)
    x, residual, hits, found = (
        random_tokens(64, 16),
        random_tokens(64, 16),
        torch.zeros(64, 3).bool(),
        Candidates.empty(64),
    )
    with Seen() as seen:
        detect_kernels.detect(x, rows, site, found, residual)
        for candidates in (None, found):
            suppress_kernels.suppress_(x, rows, site, hits, candidates)
            fused_kernels.add_norm_suppress_(x, residual, rows, site, weight, 1e-5, False, hits, candidates)
            fused_kernels.suppress_normed_(x, residual, rows, site, weight, 1e-5, False, hits, candidates)
    assert seen.names <= {"view", "detach"}
