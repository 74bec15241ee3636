"""What a worker saw at its sites while the proof's request ran, compared with the operator's reference."""

import hashlib
from typing import Any

import torch

from kif_kernels import SiteTensors
from kif_kernels.suppress import reference

from ..sets import CapsuleSet

# A result may be off by a rounding to its dtype of the largest value involved, and fp32's own error in the projection.
ROUNDINGS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def start(worker: Any) -> None:
    for site in _suppression(worker).sites.values():
        site.witness = []


def stop(worker: Any, chosen: CapsuleSet) -> dict[int, dict[str, Any]]:
    """Per site, of the tokens that had the set `chosen`: how many, on how many something fired, whether any moved, the
    largest error and what is allowed, and a digest of which ones fired.
    """
    suppression = _suppression(worker)
    row = suppression.row_of(chosen)
    found = {}
    for block, site in suppression.sites.items():
        calls, site.witness = site.witness or [], None
        found[block] = _compare(calls, site.tensors, row)
    return found


def _compare(
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], tensors: SiteTensors, row: int
) -> dict[str, Any]:
    tokens, fired, moved, error, allowed, gates = 0, 0, False, 0.0, 0.0, hashlib.sha256()
    for before, after, rows in calls:
        mine = rows == row
        if not bool(mine.any()):
            continue
        x, y = before[mine].double(), after[mine].double()
        wanted = x.clone()
        reference.suppress_(wanted, rows[mine], tensors)
        tokens += len(x)
        changed = (x != y).any(-1)
        moved |= bool(changed.any())
        fired += int(changed.sum())
        error = max(error, float((wanted - y).abs().max()))
        allowed = max(allowed, float(x.abs().max()) * ROUNDINGS.get(after.dtype, 2.0**-20))
        gates.update(changed.cpu().numpy().tobytes())
    return {
        "tokens": tokens, "fired": fired, "moved": moved, "error": error, "allowed": allowed,
        "gates": gates.hexdigest(),
    }  # fmt: skip


def _suppression(worker: Any) -> Any:
    return getattr(worker, "worker", worker).model_runner.kif
