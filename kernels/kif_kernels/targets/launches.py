"""What ships: the launches that the operators make, with all their arguments, recorded instead of run."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from .. import tuned
from ..add_norm_suppress import triton as add_norm
from ..detect import triton as detect
from ..layout import Candidates, SiteTensors
from ..suppress import triton as suppress
from .gpus import Gpu

RANK, MANY = 2, 1024  # rank as mined by default; signatures of a large site


@dataclass(frozen=True)
class Launch:
    """A kernel as an operator launches it. name: what is launched; width: D; arguments: as `kernel.run` takes them."""

    name: str
    width: int
    kernel: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    def changed(self, **options: Any) -> "Launch":
        """The same launch under another configuration."""
        return Launch(self.name, self.width, self.kernel, self.arguments, {**self.options, **options})


def shipped(gpu: Gpu, width: int, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Every kernel for hidden states of this width, as launched on this GPU: for one token's step and for a prefill."""
    one, set_of_64, many = (_site(width, n, dtype) for n in (1, tuned.LONGEST_CHUNK, MANY))
    x, few = torch.zeros(256, width, dtype=dtype), torch.zeros(8, width, dtype=dtype)
    residual, weight = torch.zeros_like(x), torch.zeros(width, dtype=dtype)
    rows, few_rows, found = (
        torch.zeros(256, dtype=torch.int32),
        torch.zeros(8, dtype=torch.int32),
        Candidates.empty(256),
    )
    norm = (weight, 1e-6, False, None)
    made = {
        "add_norm_suppress, one capsule": lambda: add_norm.add_norm_suppress_(x, residual, rows, one, *norm, None),
        "add_norm_suppress": lambda: add_norm.add_norm_suppress_(x, residual, rows, set_of_64, *norm, None),
        "add_norm_suppress, candidates": lambda: add_norm.add_norm_suppress_(x, residual, rows, many, *norm, found),
        "suppress_normed": lambda: add_norm.suppress_normed_(x, residual, rows, set_of_64, *norm, None),
        "suppress": lambda: suppress.suppress_(few, few_rows, set_of_64, None, None),
        "suppress, tiles": lambda: suppress.suppress_(x, rows, set_of_64, None, None),
        "suppress, gradient": lambda: suppress.suppress_backward(x, residual, rows, set_of_64),
        "detect, few tokens": lambda: detect.detect(few, few_rows, many, found.first(8), few),
        "detect": lambda: detect.detect(x, rows, many, found, residual),
    }
    with standing_in(gpu):
        result = []
        for name, call in made.items():
            with recorded() as launches:
                call()
            result += [Launch(name, width, *launch) for launch in launches]
    return result


def _site(width: int, signatures: int, dtype: torch.dtype) -> SiteTensors:
    return SiteTensors.empty(width=width, signatures=signatures, rank=RANK, rows=64, set_length=signatures, dtype=dtype)


@contextmanager
def recorded() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """(kernel, arguments, options) of every launch inside the block; nothing is run."""
    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append((kernel, arguments, options))

    with replaced(JITFunction, "run", run):
        yield found


@contextmanager
def standing_in(gpu: Gpu) -> Iterator[None]:
    """Configurations are looked up as on this GPU, whatever device the tensors are on."""
    tables = tuned._tables()
    table = tables["default"] | tables.get(gpu.name, {})
    with ExitStack() as stack:
        stack.enter_context(replaced(tuned, "table", lambda device: table))
        stack.enter_context(replaced(torch.version, "hip", "6" if gpu.amd else None))
        yield


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
