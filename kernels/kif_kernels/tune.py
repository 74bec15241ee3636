"""`python -m kif_kernels.tune [-o FILE]`: measure which configurations are fastest on this machine's GPU.

It writes the table for this kind of GPU that `tuned` reads: use it with KIF_TUNED=FILE, or put it into `tuned.json`.
Every configuration gives the same bits, so a table can only be slow, never wrong. Takes some minutes, most of it
compiling. Without a GPU it says so and ends with 2.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch

from . import tuned
from .layout import Candidates, SiteTensors

Config = dict[str, int]
WIDTHS, TOKENS, LAST = (512, 1024, 2048, 4096, 8192), (32, 1024), 1 << 31
_ROWS = [{"BLOCK": block, "num_warps": warps} for block in (2, 4, 8) for warps in (1, 2, 4, 8, 16)]
_TILES = [
    {"BLOCK_N": n, "BLOCK_S": s, "BLOCK_D": d, "num_warps": warps}
    for n in (16, 32, 64, 128)
    for s in (16, 32, 64, 128)
    for d in (32, 64, 128)
    for warps in (4, 8)
    if n * s <= 8192 and (n + s) * d <= 16384
]
SPACE = {"row": _ROWS, "backward": _ROWS, "suppress": [c for c in _TILES if c["BLOCK_N"] <= 32], "detect": _TILES}
SIZES = {
    "row": ("width", WIDTHS),
    "backward": ("width", WIDTHS),
    "suppress": ("tokens", TOKENS[1:]),
    "detect": ("tokens", TOKENS),
}


def best(configs: Iterable[Config], cost: Callable[[Config], float]) -> Config:
    """The cheapest; RuntimeError where none runs."""
    chosen, least = None, inf
    for config in configs:
        if (spent := cost(config)) < least:
            chosen, least = config, spent
    if chosen is None:
        raise RuntimeError("no configuration runs on this GPU; please report it with the GPU's name")
    return chosen


def new_table(cost: Callable[[str, int, Config], float], report: Callable[[str], None]) -> dict[str, Any]:
    """A table of the cheapest configurations. cost(kernel, size, config): size is a width, or for tiles a number of
    tokens.
    """
    table: dict[str, Any] = {}
    for kernel, (by, sizes) in SIZES.items():
        table[kernel] = []
        for size in sizes:
            chosen = best(SPACE[kernel], partial(cost, kernel, size))
            table[kernel].append({by: LAST if by == "tokens" and size == sizes[-1] else size, **chosen})
            report(f"{kernel}, {by} {size}: {chosen}")
    return table


def measured(kernel: str, size: int, config: Config) -> float:
    """Milliseconds (the product, where two loads are timed) of `kernel` in this configuration, inf if it cannot run."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    device = torch.device("cuda", torch.cuda.current_device())
    tuned.table(device)[kernel] = [{"width": LAST, "tokens": LAST, **config}]
    tuned.table(device)["tiles_from"] = {"tokens": 1 if kernel == "suppress" else LAST, "signatures": 1}
    spent = 1.0
    try:
        for run in loads(kernel, size, device):
            spent *= do_bench(run, return_mode="median")
    except (OutOfResources, CompilationError):
        return inf
    return spent


def loads(kernel: str, size: int, device: torch.device) -> Iterator[Callable[[], Any]]:
    """What a kernel is timed on: for rows, decoding and prefill with 4 signatures; tiles at 4096 wide."""
    from .add_norm_suppress import triton as fused
    from .detect import triton as detect
    from .suppress import triton as suppress

    width = size if kernel in ("row", "backward") else 4096
    site = random_site(width, {"detect": 4096, "suppress": 32}.get(kernel, 4), device)
    weight = torch.ones(width, dtype=torch.bfloat16, device=device)
    for tokens in (16, 2048) if kernel in ("row", "backward") else (size,):
        x, residual = torch.randn(2, tokens, width, device=device).bfloat16()
        rows = torch.zeros(tokens, dtype=torch.int32, device=device)
        candidates = Candidates.empty(tokens, device=device)
        runs: dict[str, Callable[[], Any]] = {
            "row": partial(fused.add_norm_suppress_, x, residual, rows, site, weight, 1e-5, False, None, None),
            "backward": partial(suppress.suppress_backward, residual, x, rows, site),
            "suppress": partial(suppress.suppress_, x, rows, site),
            "detect": partial(detect.detect, x, rows, site, candidates, residual),
        }
        yield runs[kernel]


def random_site(width: int, signatures: int, device: torch.device) -> SiteTensors:
    """Hard signatures of rank 2 in one set, that fire on about one token in 30,000 each."""
    site = SiteTensors.empty(
        width=width, signatures=signatures, rank=2, rows=1, set_length=signatures, device=device, dtype=torch.bfloat16
    )
    site.detector.normal_().div_(width**0.5)
    site.bias.fill_(-4.0)
    site.basis.normal_().div_(width**0.5)
    site.strength.fill_(1.0)
    site.owner.zero_()
    site.used.fill_(signatures)
    site.write_screen(slice(0, signatures))
    site.write_set(0, list(range(signatures)))
    return site


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kif_kernels.tune", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("kif-tuned.json"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU here: configurations are measured on the machine that will run them", file=sys.stderr)
        return 2
    table = {tuned.architecture(torch.cuda.current_device()): new_table(measured, print)}
    options.output.write_text(json.dumps(table, indent=2) + "\n")
    print(f"{options.output} is written; KIF_TUNED={options.output} uses it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
