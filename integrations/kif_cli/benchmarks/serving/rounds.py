"""The measurement itself: a stock server stays up, KIF's servers come one after another, and each round asks both.

Ratios are taken within a round, which asks one server and then the other, the first of them in turn; so what the
machine does meanwhile falls on both. Prompts are random tokens, the same for both servers, and never sent twice.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from kif_runtime import Capsule
from kif_runtime.errors import KifError
from kif_runtime.files import shown
from kif_runtime.mining.control import usual_sites
from kif_vllm import serve

from ...loading import open_model
from ..measuring import circumstances
from . import load as traffic
from .cells import Cell, Grid, Load, Table
from .servers import HOST, Server
from .standins import TRIGGER, Ground, drawn, ground, prompt

Progress = Callable[[int, int, str], None]
BASE, ADAPTER = "base", "adapter"  # the names by which requests choose
SUFFIX = ".kif.safetensors"


def measured(
    model: str, grid: Grid, mined: Path | None, adapter: Path | None, flags: Sequence[str], out: Path | None,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Run the grid. mined: a folder of capsules; without it they are drawn at random. flags: for both servers.

    out: where requests.csv grows, and the servers' logs are; what is there already is not measured again. Gives
    {"circumstances", "serving": one row of ratios for each cell}. Raises KifError.
    """
    if any(flag.partition("=")[0] == serve.FLAG for flag in flags):
        raise KifError(f"{serve.FLAG} is made by the benchmark; leave it out")
    flags = [*_flags(grid, adapter), *flags]
    stands_on = circumstances() | {
        "model": model, "kind": "drawn" if mined is None else "mined", "adapter_given": adapter is not None,
        "capsules_digest": None if mined is None else _digest(mined),
        "requests": grid.requests, "seed": grid.seed, "flags": " ".join(flags),
        "environment": " ".join(f"{k}={v}" for k, v in sorted(_environment().items()) if k.startswith("VLLM_")),
    }  # fmt: skip
    table = Table(None if out is None else out / "requests.csv", stands_on)
    with ExitStack() as stack:
        stack.enter_context(_ended_in_order())
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kif-bench-")))
        todo = _Todo(grid, table, progress)
        if todo.left:
            loaded, tokenizer = open_model(model, device="cpu")
            seen = ground(loaded, tokenizer)
            del loaded
            known = None if mined is None else _mined(mined, seen, max(grid.sizes) - 1)
            plain = stack.enter_context(Server(serve.stock(model, flags, _environment()), folder / "stock.log"))
            for load in grid.loads():
                if todo.of(load):
                    with _served(model, load, known, seen, flags, folder) as server:
                        _warm({"stock": plain, "kif": server}, grid, load, seen)
                        for cell, turn in todo.of(load):
                            table.add(cell, turn, _both(plain, server, grid, cell, turn, seen))
                            todo.done()
    return {"circumstances": stands_on, "serving": table.ratios()}


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Who ends this process politely ends the servers, too: they are in process groups of their own."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _mined(folder: Path, seen: Ground, most: int) -> list[Capsule]:
    """The capsules of a folder, `most` of them at most. Raises KifError where there are fewer, or for another model."""
    paths = sorted(folder.glob("*" + SUFFIX))
    if len(paths) < most:
        raise KifError(f"{shown(folder)} holds {len(paths)} capsules, and {most} are wanted; choose smaller --sizes")
    return [Capsule.load(path, seen.fingerprint) for path in paths[:most]]


def _digest(folder: Path) -> str:
    """Of all that the folder's capsules hold, in the order that they are taken in."""
    digests = [Capsule.load(path).digest for path in sorted(folder.glob("*" + SUFFIX))]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


class _Todo:
    """Which cells are to be measured, and how many are left."""

    def __init__(self, grid: Grid, table: Table, progress: Progress) -> None:
        self.grid, self.table, self.progress = grid, table, progress
        self.left = self.total = sum(len(self.of(load)) for load in grid.loads())
        self.told()

    def of(self, load: Load) -> list[tuple[Cell, int]]:
        every = [(cell, turn) for turn in range(self.grid.rounds) for cell in self.grid.cells(load)]
        return [(cell, turn) for cell, turn in every if not self.table.holds(cell, turn)]

    def done(self) -> None:
        self.left -= 1
        self.told()

    def told(self) -> None:
        self.progress(self.total - self.left, self.total, "measuring")


def _flags(grid: Grid, adapter: Path | None) -> list[str]:
    flags = ["--served-model-name", BASE, "--max-model-len", str(grid.longest + 1), "--seed", str(grid.seed)]
    flags += ["--max-num-seqs", str(max(grid.concurrency))]
    if torch.cuda.is_available():
        flags += ["--gpu-memory-utilization", "0.42"]  # both servers are up at once
    if adapter is not None:
        flags += ["--enable-lora", "--lora-modules", f"{ADAPTER}={adapter}", "--max-lora-rank", str(_rank(adapter))]
    return flags


def _rank(adapter: Path) -> int:
    """The least of vLLM's ranks that the adapter fits in."""
    try:
        rank = int(json.loads((adapter / "adapter_config.json").read_text())["r"])
        return next(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        raise KifError(f"{shown(adapter)} holds no LoRA adapter that vLLM can serve; give the folder of one") from None


def _environment() -> dict[str, str]:
    """On a CPU two servers share the cores, and neither may take all of the memory."""
    own = {} if torch.cuda.is_available() else {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return own | dict(os.environ)


@contextmanager
def _served(
    model: str, load: Load, known: Sequence[Capsule] | None, seen: Ground, flags: list[str], folder: Path
) -> Iterator[Server]:
    """KIF's server with the capsules of this load; the trigger is one of them.

    They lie in the same place for every load, at the same sites: vLLM keys what it compiles by its configuration.
    """
    place, others = folder / "kif-bench-capsules", max(0, load.capsules - 1)
    shutil.rmtree(place, ignore_errors=True)  # a benchmark that was killed may have left it
    place.mkdir()
    for number, capsule in enumerate(drawn(seen, others) if known is None else islice(known, others)):
        capsule.save(place / f"{number}{SUFFIX}")
    if load.capsules:
        seen.trigger.save(place / f"{TRIGGER}{SUFFIX}")
    sites = {*usual_sites(seen.blocks), *(site for capsule in known or () for site in capsule.sites)}
    mandatory: str | list[str] = "all" if load.applied == "mandatory" else []
    table = {"mandatory": mandatory, "watch": 0, "sites": sorted(sites)}
    own = [serve.FLAG, json.dumps({"kif": table})]
    try:
        launch = serve.prepare(model, place, [*flags, *own], _environment())
        with Server(launch, folder / f"kif-{load.capsules}-{load.applied}.log") as server:
            yield server
    finally:
        shutil.rmtree(place)


def _warm(servers: dict[str, Server], grid: Grid, load: Load, seen: Ground) -> None:
    """Each shape once, untimed: what is built or compiled at first use is not measured."""
    for cell in grid.cells(load):
        for server in servers.values():
            _ask(server, _requests(grid, cell, -1, seen)[: cell.concurrency], cell)


def _both(plain: Server, server: Server, grid: Grid, cell: Cell, turn: int, seen: Ground) -> dict[str, Any]:
    requests = _requests(grid, cell, turn, seen)
    order = [("stock", plain), ("kif", server)]
    found: dict[str, Any] = {}
    for name, one in order if turn % 2 == 0 else reversed(order):
        before = one.counters()
        found[name] = _ask(one, requests, cell)
        more = {counter: total - before[counter] for counter, total in one.counters().items()}
        share = more["gate_seconds"] / more["forward_seconds"] if more["forward_seconds"] else 0.0
        found[name] |= {"touched_seen": 100 * more["requests_touched"] / len(requests), "gate_share": share}
    return {name: found[name] for name, _ in order}


def _ask(server: Server, requests: list[dict[str, Any]], cell: Cell) -> dict[str, float]:
    before = server.cpu_seconds()
    found = traffic.measured(HOST, server.port, requests, cell.concurrency, cell.output)
    return found | {"cpu_seconds": server.cpu_seconds() - before}


def _requests(grid: Grid, cell: Cell, turn: int, seen: Ground) -> list[dict[str, Any]]:
    """The asked share of a cell's requests is touched, evenly over all its rounds, the very first one among them."""
    rng = torch.Generator().manual_seed(random.Random(f"{grid.seed} {cell} {turn}").getrandbits(63))
    step = round(100 / cell.touched) if cell.touched else 0
    count = max(grid.requests, cell.concurrency)
    made = []
    for number in range(count):
        touched = step > 0 and (max(0, turn) * count + number) % step == 0
        request: dict[str, Any] = {
            "model": ADAPTER if cell.adapter else BASE, "prompt": prompt(rng, cell.prompt, seen, touched),
            "max_tokens": cell.output, "min_tokens": cell.output, "ignore_eos": True, "temperature": 0,
        }  # fmt: skip
        if touched and cell.applied == "resident":
            request["vllm_xargs"] = {"kif": [TRIGGER]}
        made.append(request)
    return made
