"""Builds as rows of a table, and the three numbers by which Forge-UGC (arXiv 2604.16498) judges a fusion."""

from collections.abc import Iterable
from typing import Any

from .building import Build
from .gpus import Gpu
from .traffic import Traffic

LAUNCH_SECONDS = 2e-6  # what a launch costs in the model below, whatever it does
# What the fused kernel does, op by op: how often the rows [N, D] are read or written, and launches.
UNFUSED = {"add": 3, "rms and scores": 1, "project": 2, "norm": 2}
FUSED = {"add, scores, project, norm": 4}


def rows(builds: Iterable[Build]) -> list[dict[str, Any]]:
    """One for each kernel and target: what it is, what it takes, and the seconds of each pass."""
    return [
        {
            "kernel": b.launch.name, "width": b.launch.width, "target": b.gpu.name, "warps": b.warps,
            "registers": b.resources.registers, "spills": b.resources.spills, "local": b.resources.local,
            "shared": b.shared, "occupancy": round(b.occupancy, 3), "row_bits": b.narrowest_row_access,
            "seconds": round(b.seconds, 3), "passes": {name: round(s, 4) for name, s in b.passes.items()},
            "accesses": _accesses(b),
        }
        for b in builds
    ]  # fmt: skip


def _accesses(built: Build) -> dict[str, int]:
    """Instructions for global memory by kind and width, as "load 128"."""
    found: dict[str, int] = {}
    for a in built.accesses:
        name = f"{a.kind} {a.bits}"
        found[name] = found.get(name, 0) + a.count
    return found


def fusion(built: Build, counted: Traffic, tokens: int) -> dict[str, float]:
    """Of the fused operator for `tokens` tokens: `gain` and `efficiency` (its passes' seconds are in the rows).

    gain: estimated seconds without fusion ÷ with. efficiency: gain per second of compiling. The estimate is a roofline:
    these steps do little arithmetic, so each launch costs LAUNCH_SECONDS and the time its bytes take at the memory's
    published bandwidth. Unfused, the rows move 8 times in 4 launches (add: 2 reads, 1 write; rms and scores: 1 read;
    project and norm: 1 read, 1 write each); fused 4 times in 1, and the site's own bytes once in both.
    """
    row = counted.least / 4
    unfused = _seconds(built.gpu, len(UNFUSED), sum(UNFUSED.values()) * row * tokens + counted.shared * tokens)
    fused = _seconds(built.gpu, len(FUSED), (counted.rows + counted.shared) * tokens)
    return {"tokens": tokens, "gain": unfused / fused, "efficiency": unfused / fused / built.seconds}


def _seconds(gpu: Gpu, launches: int, bytes_moved: float) -> float:
    return launches * LAUNCH_SECONDS + bytes_moved / gpu.bandwidth
