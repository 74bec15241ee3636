"""The kernels as compiled for GPUs that are not here: rows, bytes moved, gain of fusion, and what fails the gate."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kif_kernels import targets

from .charts import bars
from .record import Record

FUSED, ONE = "add_norm_suppress", "add_norm_suppress, one capsule"
STEPS = (1, 256, 8192)  # tokens that the gain of fusion is estimated for
Report = Callable[[int, int, str], None]


def measured(output: Path | None, widths: Iterable[int], report: Report) -> tuple[dict[str, Any], dict[str, str]]:
    """(results, plots) for `kif bench --compiled`; results are kept in the folder `output`, width by width."""
    record = Record(output, {"compiled": True})
    for width in widths:
        counted = _traffic(record, width)
        for gpu in targets.GPUS.values():
            if not record.rows("compiled", width=width, target=gpu.name):
                _compile(record, gpu, width, counted, report)
    registers = {f"D {r['width']}, {r['target']}": float(r["registers"]) for r in record.rows("compiled", kernel=FUSED)}
    return record.results, {"registers": bars("Registers of the fused operator", registers, "per thread")}


def _traffic(record: Record, width: int) -> targets.Traffic:
    """The bytes that a token moves with one capsule; beside it, in the table, with 64 signatures."""
    if not record.rows("traffic", width=width):
        found = [targets.traffic(width, signatures) for signatures in (1, 64)]
        record.add("traffic", [vars(t) | {"ratio": t.ratio} for t in found])
        record.add("failures", [{"failure": line} for line in targets.failures([], found)])
    one = record.rows("traffic", width=width, signatures=1)[0]
    return targets.Traffic(**{name: value for name, value in one.items() if name != "ratio"})


def _compile(record: Record, gpu: targets.Gpu, width: int, counted: targets.Traffic, report: Report) -> None:
    builds, launches = [], targets.shipped(gpu, width)
    for done, launch in enumerate(launches, 1):
        builds.append(targets.build(launch, gpu))
        report(done, len(launches), f"compiling for {gpu.name}, D {width}")
    gains = [targets.fusion(b, counted, tokens) for b in builds if b.launch.name == ONE for tokens in STEPS]
    record.add("fusion", [{"width": width, "target": gpu.name} | gain for gain in gains])
    record.add("failures", [{"failure": line} for line in targets.failures(builds)])
    record.add("compiled", targets.rows(builds))  # last: these rows say that this width is done
