"""Compiling a launch for a GPU that is not there, as Triton would on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .gpus import GPUS, Gpu
from .launches import Launch, replaced
from .machine_code import Access, Resources, read


@dataclass(frozen=True)
class Build:
    """One kernel on one target. passes: seconds by what the pass makes (ttir, ttgir, llir, ptx, cubin; AMD: amdgcn,
    hsaco), with `ast` for what comes before them. shared: bytes that a program takes when it is launched."""

    launch: Launch
    gpu: Gpu
    warps: int
    shared: int
    resources: Resources
    accesses: tuple[Access, ...]
    passes: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.passes.values())

    @property
    def occupancy(self) -> float:
        return self.gpu.occupancy(self.resources.registers, self.shared, self.warps)

    @property
    def narrowest_row_access(self) -> int | None:
        """Bits of the narrowest load or store of a whole row of D numbers; None where there is none."""
        return min((a.bits for a in self.accesses if a.of_row), default=None)


def build(launch: Launch, gpu: Gpu) -> Build:
    """Compile from source, past every cache."""
    times: list[Any] = []
    with (
        _driver(gpu),
        replaced(knobs.compilation, "always_compile", True),
        replaced(knobs.compilation, "listener", lambda **told: times.append(told["times"])),
    ):
        launch.kernel.device_caches.pop(_number(gpu), None)
        code = launch.kernel.run(*launch.arguments, grid=(1,), warmup=True, **launch.options)
        code = code.result() if hasattr(code, "result") else code
    passes = {"ast": times[-1].ir_initialization} | dict(times[-1].lowering_stages)
    return Build(
        launch, gpu, code.metadata.num_warps, code.metadata.shared, *read(code.asm, gpu.amd),
        {name: microseconds / 1e6 for name, microseconds in passes.items()},
    )  # fmt: skip


def _number(gpu: Gpu) -> int:
    return list(GPUS).index(gpu.name)


@contextmanager
def _driver(gpu: Gpu) -> Iterator[None]:
    """Triton takes this GPU for the active device."""
    before = driver._active
    driver.set_active(_Absent(gpu))
    try:
        yield
    finally:
        driver._active = before


class _Absent:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, gpu: Gpu) -> None:
        name = gpu.name
        target = ("hip", name) if gpu.amd else ("cuda", int(name.removeprefix("sm_")))
        self._target, self._number = GPUTarget(*target, gpu.lanes), _number(gpu)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
