"""Times of the kernels on a GPU, beside others that do the same or a part of it (`cases`). No GPU, no figure.

What is measured is the fused operator (with `detect` before it where sets are longer than 64), in bf16, where nothing
fires and where one token in a hundred does. A kernel that differs from the specification is not timed.
"""

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch

from kif_runtime.errors import KifError

from .cases import KIF, PEERS, Case, Peer, case, check
from .charts import curves
from .measuring import Call
from .record import Record

TOKENS, SIGNATURES = (1, 8, 64, 512, 2048, 8192), (0, 1, 16, 64, 1000, 10000)
QUANTILES = (0.2, 0.5, 0.8)


def measured(
    output: Path | None, widths: Iterable[int], peers: Iterable[str], rounds: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """(results, plots) for `kif bench --gpu`; results are kept in the folder `output`, row by row.

    Raises KifError for an unknown peer, and where there is no GPU.
    """
    peers = tuple(peers) or tuple(PEERS)
    for peer in peers:
        if peer not in PEERS:
            raise KifError(f"--against {peer!r} is not among {', '.join(PEERS)}")
    if not torch.cuda.is_available():
        raise KifError("there is no GPU that torch can use here, so nothing was measured; try --compiled")
    record = Record(output, {"rounds": rounds})
    if not record.rows("copy"):
        record.add("copy", [{"bytes_per_second": copy_bandwidth()}])
    for width in widths:
        for tokens, signatures in product(TOKENS, SIGNATURES):
            for firing in (False, True) if signatures else (False,):
                _measure(record, case(tokens, width, signatures, firing, "cuda"), signatures, peers, rounds)
    return record.results, {f"gpu-{width}": _plot(width, record.rows("gpu")) for width in widths}


def _measure(record: Record, c: Case, signatures: int, peers: Iterable[str], rounds: int) -> None:
    """Into the table `gpu`: one shape, with KIF and, where nothing fires, those peers that depend on the shape."""
    tokens, width = c.hidden.shape
    shape = {"tokens": tokens, "width": width, "signatures": signatures, "firing": c.firing}
    wanted = {"kif": KIF} | {name: PEERS[name] for name in peers if not c.firing}
    wanted = {name: peer for name, peer in wanted.items() if peer.by_signatures or not signatures}
    missing = {name: peer for name, peer in wanted.items() if not record.rows("gpu", **shape, what=name)}
    if "kif" in missing and (c.candidates is None or tokens <= TOKENS[1]):
        check(c)
    c.site.strength.zero_()  # the same work, and a token that fired fires again at the next call
    bandwidth = record.rows("copy")[0]["bytes_per_second"]
    for name, peer in missing.items():
        record.add("gpu", [shape | {"what": name} | _costs(peer, c, bandwidth, rounds)])


def _costs(peer: Peer, c: Case, bandwidth: float, rounds: int) -> dict[str, Any]:
    """Seconds, bytes that have to be moved per second, launches. A peer's failure is a row, too; KIF's is an error."""
    try:
        call = peer.prepare(c)
        call()
    except Exception as problem:
        if peer is KIF:
            raise
        return costs(None, None, 0, bandwidth, why_not=f"{type(problem).__name__}: {problem}".splitlines()[0][:200])
    return costs(timed(call, rounds), launches(call), peer.rows * c.hidden.nbytes, bandwidth)


def costs(
    seconds: tuple[float, float, float] | None,
    launched: int | None,
    least: int,
    bandwidth: float,
    why_not: str | None = None,
) -> dict[str, Any]:
    """seconds: p20, p50 and p80; least: the bytes that have to be moved; bandwidth: what a copy moves per second."""
    p20, p50, p80 = seconds or (None, None, None)
    moved = None if p50 is None else least / p50
    return {
        "p20": p20, "p50": p50, "p80": p80, "bytes_per_second": moved,
        "of_copy_bandwidth": None if moved is None else moved / bandwidth, "launches": launched, "why_not": why_not,
    }  # fmt: skip


def timed(call: Call, rounds: int) -> tuple[float, float, float]:
    """p20, p50, p80 in seconds; compiled and warm, with the cache emptied between calls. 20 ms a round."""
    from triton.testing import do_bench

    return tuple(1e-3 * ms for ms in do_bench(call, rep=20 * rounds, quantiles=QUANTILES))


def launches(call: Call) -> int:
    """Kernels and fills that one call puts on the device, as the profiler counts them."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes per second that a copy of `size` bytes reads and writes."""
    source = torch.empty(size, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), 5)[1]


def _plot(width: int, rows: Iterable[Mapping[str, Any]]) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        if r["width"] == width and r["p50"] and not r["firing"] and (r["what"] == "kif" or r["signatures"] == 0):
            name = f"kif, {r['signatures']}" if r["what"] == "kif" else r["what"]
            series.setdefault(name, []).append((r["tokens"], 1e6 * r["p50"]))
    return curves(f"Add, suppress and norm, D {width}", "tokens", "microseconds", series)
