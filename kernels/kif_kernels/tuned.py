"""Which configuration a kernel runs with: data, looked up by device and shape, never searched for at run time.

`tuned.json` has a table for each kind of GPU ("sm_90", "gfx942") and "default" for all others. In a table, "row" is for
the kernels with one program per token and "backward" for that of the gradient, by the width D; "suppress" and "detect"
are for those with a tile of tokens, by the number of tokens: the first entry that is large enough holds. "tiles_from"
says from how many tokens and signatures of a set on `suppress_` works in tiles. Only speed depends on these numbers, no
bit of a result. `python -m kif_kernels.tune` measures a table on the GPU it finds; KIF_TUNED=FILE uses such a file.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .layout import KernelError

LONGEST_CHUNK = 64  # signatures of a set that a row kernel decides on before it applies them
WIDEST = 8192  # numbers of a token that a program holds in registers; more would spill on every target


@cache
def _tables() -> dict[str, Any]:
    shipped = json.loads(Path(__file__).with_name("tuned.json").read_text())
    own = os.environ.get("KIF_TUNED")
    if not own:
        return shipped
    try:
        return shipped | json.loads(Path(own).read_text())
    except (OSError, ValueError) as problem:
        raise KernelError(f"KIF_TUNED={own} cannot be read as JSON ({problem}); unset it or run the tuner") from None


def architecture(index: int = 0) -> str:
    """ "sm_90" or "gfx942": the kind of GPU number `index`."""
    properties = torch.cuda.get_device_properties(index)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


@cache
def table(device: torch.device) -> dict[str, Any]:
    """What holds on this device; the default's entry wherever the device's own table has none."""
    tables = _tables()
    return tables["default"] | (tables.get(architecture(device.index or 0), {}) if device.type == "cuda" else {})


def row_config(kernel: str, width: int, chunk: int, x: Tensor) -> dict[str, int]:
    """num_warps and BLOCK (signatures scored at once) of "row" or "backward", which decides `chunk` of them at once; on
    NVIDIA perhaps maxnreg, where the assembler would rather spill than take more registers."""
    config = _first(table(x.device)[kernel], "width", width)
    return config | {"BLOCK": min(chunk, config["BLOCK"])}


def in_tiles(tokens: int, signatures: int, x: Tensor) -> bool:
    """Whether `suppress_` works on tiles of tokens."""
    least = table(x.device)["tiles_from"]
    return tokens >= least["tokens"] and signatures >= least["signatures"]


def tile_config(kernel: str, tokens: int, x: Tensor) -> dict[str, Any]:
    """Tile sizes and num_warps for `kernel`, "suppress" or "detect", and PRECISION: what `tl.dot` makes of fp32."""
    return _first(table(x.device)[kernel], "tokens", tokens) | {"PRECISION": "ieee" if torch.version.hip else "tf32"}


def _first(entries: list[dict[str, int]], by: str, size: int) -> dict[str, int]:
    for entry in entries:
        if size <= entry[by]:
            return {name: value for name, value in entry.items() if name != by}
    raise KernelError(f"no configuration for {by} {size}: the tables go to {entries[-1][by]}")
