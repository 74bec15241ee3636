"""The kernels as compiled for GPUs that are not here: rows, bytes moved, gain of fusion, and what fails the gate."""

from collections.abc import Callable, Iterable
from typing import Any

from kif_kernels import targets

from .charts import bars
from .measuring import circumstances

FUSED, ONE = "add_norm_suppress", "add_norm_suppress, one capsule"
STEPS = (1, 256, 8192)  # tokens that the gain of fusion is estimated for


def measured(widths: Iterable[int], report: Callable[[int, int, str], None]) -> tuple[dict[str, Any], dict[str, str]]:
    """(results, plots) for `kif bench --compiled`."""
    widths = tuple(widths)
    builds = [built for gpu in targets.GPUS.values() for width in widths for built in _builds(gpu, width, report)]
    counted = {(width, n): targets.traffic(width, n) for width in widths for n in (1, 64)}
    rows = targets.rows(builds)
    results = {
        "circumstances": circumstances(),
        "compiled": rows,
        "traffic": [vars(t) | {"ratio": t.ratio} for t in counted.values()],
        "fusion": [
            {"width": b.launch.width, "target": b.gpu.name} | targets.fusion(b, counted[b.launch.width, 1], tokens)
            for b in builds
            if b.launch.name == ONE
            for tokens in STEPS
        ],
        "failures": [{"failure": line} for line in targets.failures(builds, counted.values())],
    }
    registers = {f"D {r['width']}, {r['target']}": float(r["registers"]) for r in rows if r["kernel"] == FUSED}
    return results, {"registers": bars("Registers of the fused operator", registers, "per thread")}


def _builds(gpu: targets.Gpu, width: int, report: Callable[[int, int, str], None]) -> Iterable[targets.Build]:
    launches = targets.shipped(gpu, width)
    for done, launch in enumerate(launches, 1):
        yield targets.build(launch, gpu)
        report(done, len(launches), f"compiling for {gpu.name}, D {width}")
