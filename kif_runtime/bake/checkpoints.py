"""Checkpoints: one file, written in one go, from which training goes on as if it had never stopped.

Everything random in a step follows from the seed and the step's number, so the file needs no generators' states: the
adapter, the optimiser, what the objective remembers, and the best adapter so far are all there is.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import BakingError
from ..files import atomic_write, shown

NAME = "checkpoint.safetensors"


@dataclass
class Checkpoint:
    """After `step` steps. run: what tells this run from another. adapter, best: parameters by name; best is empty
    before the first validation. moments: AdamW's state by parameter. objective: what the objective remembers. meta:
    plain JSON.
    """

    run: str
    step: int
    adapter: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    objective: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Replace the checkpoint in `folder`. Raises BakingError where it cannot be written, the old one then stays."""
        tensors = {f"adapter/{n}": t for n, t in self.adapter.items()}
        tensors |= {f"moments/{n}/{k}": t for n, state in self.moments.items() for k, t in state.items()}
        tensors |= {f"objective/{n}": t for n, t in self.objective.items()}
        tensors |= {f"best/{n}": t for n, t in self.best.items()}
        meta = {"run": self.run, "step": self.step, "meta": self.meta}
        data = save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, {"kif": json.dumps(meta)})
        atomic_write(folder / NAME, data, error=BakingError)


def read(folder: Path, run: str) -> Checkpoint | None:
    """The checkpoint of this run in `folder`, None where there is none. Raises BakingError for one that cannot be read,
    or is of another run: other capsules, subjects, settings, or another version."""
    path = folder / NAME
    if not os.path.lexists(path):
        return None
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads(file.metadata()["kif"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        found = Checkpoint(meta["run"], meta["step"], {}, {}, meta=meta["meta"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        raise BakingError(f"{shown(path)} cannot be read; remove it to begin anew") from None
    if found.run != run:
        raise BakingError(f"{shown(path)} is of another run; remove it, or choose another folder")
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "moments":
            parameter, _, key = rest.rpartition("/")
            found.moments.setdefault(parameter, {})[key] = tensor
        else:
            getattr(found, kind)[rest] = tensor
    return found


def moments(optimiser: torch.optim.Optimizer, adapter: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The optimiser's state by the parameter's name."""
    return {n: dict(optimiser.state[p]) for n, p in adapter.items() if p in optimiser.state}


def restore_moments(
    optimiser: torch.optim.Optimizer, adapter: Mapping[str, Tensor], found: Mapping[str, dict[str, Tensor]]
) -> None:
    for name, parameter in adapter.items():
        if name in found:
            state = {k: t.to(parameter.device) if k != "step" else t for k, t in found[name].items()}
            optimiser.state[parameter] = state
