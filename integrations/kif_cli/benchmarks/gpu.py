"""Times of the kernels on a GPU, beside others that do the same or a part of it. No GPU, no figure.

What is measured is the fused operator (with `detect` before it where sets are longer than 64), in bf16, where nothing
fires and where one token in a hundred does. Its peers: vLLM's and Liger's fused add and RMSNorm, the same in plain
torch and compiled, which suppress nothing; and what other interventions launch after such a norm: `add` (a vector per
row, in place), `copy` (the same into another tensor), `dense` (all slots for all tokens). A kernel that differs from
the specification is not timed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kif_kernels import Candidates, SiteTensors, add_norm_suppress_, detect
from kif_kernels.add_norm_suppress import reference
from kif_runtime.errors import KifError

from .charts import curves
from .growth import dense
from .measuring import Call, circumstances

TOKENS, SIGNATURES = (1, 8, 64, 512, 2048, 8192), (0, 1, 16, 64, 1000, 10000)
RANK, EPSILON, FUSED_LIMIT = 2, 1e-6, 64
QUANTILES = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Case:
    """One shape: tensors on the device. `firing`: how many tokens a signature fires on."""

    site: SiteTensors
    hidden: Tensor  # [N, D] bf16
    residual: Tensor  # [N, D] bf16
    weight: Tensor  # [D] bf16
    rows: Tensor  # [N] int32
    candidates: Candidates | None
    firing: int

    @property
    def least_bytes(self) -> int:
        """Read hidden and residual, write both."""
        return 4 * self.hidden.nbytes


def case(tokens: int, width: int, signatures: int, firing: bool, device: torch.device | str) -> Case:
    """Random states, and detectors of length 1 that fire on nothing but every hundredth token, where asked for."""
    g = torch.Generator().manual_seed(0)
    hidden, residual = torch.randn(2, tokens, width, generator=g).bfloat16()
    slots = max(1, signatures)
    site = SiteTensors.empty(
        width=width, signatures=slots, rank=RANK, rows=1, set_length=slots, device=device, dtype=torch.bfloat16
    )
    chosen = range(0, tokens if firing and signatures else 0, 100)
    if signatures:
        detector = torch.nn.functional.normalize(torch.randn(slots, width, generator=g), dim=1)
        for n in chosen:
            hidden[n], residual[n] = detector[n % slots] * width**0.5, 0.0
        site.detector.copy_(detector)
        site.bias.fill_(-0.5 * width**0.5)  # half of what a token scores that lies along the detector
        basis = torch.linalg.qr(torch.randn(min(slots, 64), width, RANK, generator=g)).Q.mT
        site.basis.copy_(basis.repeat(-(-slots // len(basis)), 1, 1)[:slots])
        site.strength.fill_(1.0)
        site.owner.copy_(torch.arange(slots))
        site.used.fill_(slots)
        site.write_set(0, range(slots))
        for some in torch.arange(slots, device=device).split(1024):
            site.write_screen(some)
    return Case(
        site, hidden.to(device), residual.to(device), torch.ones(width, dtype=torch.bfloat16, device=device),
        torch.zeros(tokens, dtype=torch.int32, device=device),
        Candidates.empty(tokens, device=device) if signatures > FUSED_LIMIT else None, len(chosen),
    )  # fmt: skip


def kif(c: Case) -> None:
    if c.candidates is not None:
        detect(c.hidden, c.rows, c.site, c.candidates, residual=c.residual)
    add_norm_suppress_(c.hidden, c.residual, c.rows, c.site, c.weight, EPSILON, candidates=c.candidates)


def eager(c: Case) -> None:
    x = c.hidden.float() + c.residual.float()
    c.residual.copy_(x)
    c.hidden.copy_(reference.norm(x, c.weight, EPSILON, False, c.hidden.dtype))


def compiled(c: Case) -> Call:
    def norm(hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden.float() + residual.float()
        return reference.norm(x, weight, EPSILON, False, hidden.dtype), x.to(residual.dtype)

    call = torch.compile(norm, dynamic=False)
    return lambda: call(c.hidden, c.residual, c.weight)


def foreign(peer: str, c: Case) -> Call:
    """A kernel of another package's, in place of the server's fused add and norm."""
    module, name = FOREIGN[peer]
    kernel = getattr(import_module(module), name)
    kernel = getattr(kernel, "apply", kernel)  # Liger's is an autograd function
    return lambda: kernel(c.hidden, c.residual, c.weight, EPSILON)


def add(c: Case) -> Call:
    vectors = c.site.basis[:, 0].contiguous()
    return lambda: c.residual.add_(vectors[c.rows], alpha=1e-9)


def copy(c: Case) -> Call:
    vectors = c.site.basis[:, 0].contiguous()
    return lambda: torch.add(c.residual, vectors[c.rows], alpha=1e-9)


FOREIGN = {
    "vllm": ("vllm._custom_ops", "fused_add_rms_norm"),
    "liger": ("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction"),
}
PEERS: Mapping[str, Callable[[Case], Call]] = {
    "vllm": partial(foreign, "vllm"),
    "liger": partial(foreign, "liger"),
    "eager": lambda c: lambda: eager(c),
    "compile": compiled,
    "add": add,
    "copy": copy,
    "dense": lambda c: lambda: dense(c.residual.float(), c.site),
}


def measured(widths: Iterable[int], peers: Iterable[str], rounds: int) -> tuple[dict[str, Any], dict[str, str]]:
    """(results, plots) for `kif bench --gpu`. Raises KifError for an unknown peer, and where there is no GPU."""
    peers = tuple(peers) or tuple(PEERS)
    for peer in peers:
        if peer not in PEERS:
            raise KifError(f"--against {peer!r} is not among {', '.join(PEERS)}")
    if not torch.cuda.is_available():
        raise KifError("there is no GPU that torch can use here, so nothing was measured; try --compiled")
    bandwidth = copy_bandwidth()
    rows = [row for width in widths for row in _rows(width, peers, bandwidth, rounds)]
    results = {"circumstances": circumstances() | {"copy_bytes_per_second": bandwidth}, "gpu": rows}
    return results, {f"gpu-{width}": _plot(width, rows) for width in widths}


def _rows(width: int, peers: Iterable[str], bandwidth: float, rounds: int) -> Iterator[dict[str, Any]]:
    for tokens in TOKENS:
        for signatures in SIGNATURES:
            for firing in (False, True) if signatures else (False,):
                c = case(tokens, width, signatures, firing, "cuda")
                if c.candidates is None or tokens <= TOKENS[1]:
                    check(c)
                c.site.strength.zero_()  # the same work, and a token that fired fires again at the next call
                shape = {"tokens": tokens, "width": width, "signatures": signatures, "firing": c.firing}
                for name, call in _calls(c, peers if not firing else ()):
                    if isinstance(call, str):
                        yield row(shape, name, None, None, c.least_bytes, bandwidth, why_not=call)
                    else:
                        yield row(shape, name, timed(call, rounds), launches(call), c.least_bytes, bandwidth)


def _calls(c: Case, peers: Iterable[str]) -> Iterator[tuple[str, Call | str]]:
    """Name and call, or name and the reason why there is none: a failure is a row, too."""
    yield "kif", lambda: kif(c)
    for name in peers:
        try:
            call = PEERS[name](c)
            call()
        except (ImportError, RuntimeError, AttributeError) as problem:
            yield name, f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
        else:
            yield name, call


def row(
    shape: Mapping[str, int],
    what: str,
    seconds: tuple[float, float, float] | None,
    count: int | None,
    least: int,
    bandwidth: float,
    why_not: str | None = None,
) -> dict[str, Any]:
    """A row of the table: seconds are p20, p50 and p80; `least` the bytes that the fused operator has to move."""
    p20, p50, p80 = seconds or (None, None, None)
    moved = None if p50 is None else least / p50
    return {
        **shape, "what": what, "p20": p20, "p50": p50, "p80": p80, "bytes_per_second": moved,
        "of_copy_bandwidth": None if moved is None else moved / bandwidth, "launches": count, "why_not": why_not,
    }  # fmt: skip


def check(c: Case) -> None:
    """Raise KifError unless the kernels give what the specification gives, to within rounding.

    On copies of the first tokens: few where signatures are many, as the specification takes them one by one.
    """
    few = min(len(c.hidden), 101 if c.candidates is None else 8)
    lists = None if c.candidates is None else c.candidates.first(few)
    ours = Case(c.site, c.hidden[:few].clone(), c.residual[:few].clone(), c.weight, c.rows[:few], lists, c.firing)
    hidden, residual = c.hidden[:few].clone(), c.residual[:few].clone()
    kif(ours)
    reference.add_norm_suppress_(hidden, residual, c.rows[:few], c.site, c.weight, EPSILON)
    for name, got, expected in (("hidden", ours.hidden, hidden), ("residual", ours.residual, residual)):
        if not torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=2**-7):
            raise KifError(f"the kernels' {name} is not what the specification gives on this GPU; nothing was measured")


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
