"""Tests of the Triton kernels on CPU tensors, in Triton's interpreter.

They are collected only where TRITON_INTERPRET=1 was set before anything imported triton, for it changes what a kernel
is. `test_in_the_interpreter.py` runs them so; by hand: `TRITON_INTERPRET=1 pytest tests/kernels/interpreter`.

In two places the interpreter is not what a GPU is, and is mended here: it cuts fp32 to bf16 where a GPU rounds to
nearest even, and multiplies in full fp32 what a GPU reads as TF32, which is coarser (cut to 11 bits, the worst case).
"""

import os
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def rounded_to_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def cut_to_tf32(handle: Any) -> Any:
    handle.data = (np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return handle


@pytest.fixture(autouse=True, scope="session")
def interpreter_like_a_gpu() -> Iterator[None]:
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(values: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return rounded_to_bfloat16(values)
        return convert(values, source, target, mode)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if precision == interpreter._ir.INPUT_PRECISION.TF32:
            a, b = cut_to_tf32(a), cut_to_tf32(b)
        return dot(self, a, b, d, precision, imprecise)

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = convert_float, create_dot
    yield
    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = convert, dot


@pytest.fixture(params=[False, True], ids=["a program per token", "tiles"])
def in_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs a test on both paths of `suppress_`, whatever the tables say."""
    from kif_kernels import tuned

    monkeypatch.setattr(tuned, "in_tiles", lambda *_: request.param)
    return request.param


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched, by name."""
    names: list[str] = []
    for op in ("suppress.triton", "suppress.triton_backward", "add_norm_suppress.triton", "detect.triton"):
        module = import_module(f"kif_kernels.{op}")
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            kernel = getattr(module, name)

            class Counted:
                def __getitem__(self, grid: Any, kernel: Any = kernel, name: str = name) -> Any:
                    names.append(name)
                    return kernel[grid]

            monkeypatch.setattr(module, name, Counted())
    return names


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registered operators run what they run on a GPU, and hosts take CPU tensors for a GPU's."""
    suppress, detect = import_module("kif_kernels.suppress"), import_module("kif_kernels.detect")
    fused = import_module("kif_kernels.add_norm_suppress")
    monkeypatch.setattr(torch.ops.kif, "suppress_", suppress._suppress_gpu_)
    monkeypatch.setattr(torch.ops.kif, "detect", detect._detect_on_gpu)
    for name in ("add_norm_suppress_", "suppress_normed_"):
        monkeypatch.setattr(torch.ops.kif, name, partial(fused._on_gpu, name))
    monkeypatch.setattr(detect, "SCREENS_ITSELF", ())


@pytest.fixture
def random_tokens() -> Any:
    """random_tokens(*shape, seed=, dtype=): normal values."""

    def build(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    return build


@pytest.fixture
def on_the_edge() -> Any:
    """on_the_edge(x, detector), both [N, D]: a site where token n has set n, of one hard signature whose score there
    is the least over 0. What it does to the token cannot leave it as it was."""

    from kif_kernels import SiteTensors, scores

    def build(x: Tensor, detector: Tensor) -> SiteTensors:
        n, width = x.shape
        site = SiteTensors.empty(width=width, signatures=n, rank=1, rows=n, set_length=1)
        site.detector.copy_(detector)
        site.bias.zero_()
        site.bias.copy_(torch.nextafter(-scores(x, site).diagonal(), torch.tensor(float("inf"))))
        site.basis[:, 0, 0], site.strength[:] = 1.0, 1.0
        site.target[:, 0] = x[:, 0] + x[:, 0].abs() + 1
        site.owner.copy_(torch.arange(n))
        site.used.fill_(n)
        site.write_screen(slice(0, n))
        for row in range(n):
            site.write_set(row, [row])
        return site

    return build
