"""What a worker saw at its sites while the proof's request ran, compared with the operator's reference."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from kif_kernels import SiteTensors
from kif_kernels.suppress import reference

from ..sets import CapsuleSet
from .suppression import Suppression

# A result may be off by a rounding to its dtype of the largest value involved, and fp32's own error in the projection.
ROUNDINGS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def start(worker: Any, chosen: CapsuleSet, most: int) -> None:
    """Keep the tokens that have the set `chosen`, at most `most` of them at a site: others' batches may be large."""
    suppression = _suppression(worker)
    for site in suppression.sites.values():
        site.witness, site.watched = [], _Watched(suppression, chosen, most)


class _Watched:
    def __init__(self, suppression: Suppression, chosen: CapsuleSet, most: int) -> None:
        self.suppression, self.chosen, self.left = suppression, chosen, most

    def __call__(self, rows: Tensor) -> Tensor:
        row = self.suppression.row_of(self.chosen)
        if row is None or not self.left:
            return rows[:0].long()
        mine = (rows == row).nonzero()[: self.left, 0]
        self.left -= len(mine)
        return mine


def stop(worker: Any) -> dict[int, dict[str, Any]]:
    """Per site, of the tokens that were kept: how many, on how many something fired, whether any moved, the
    largest error and what is allowed, and a digest of which ones fired.
    """
    suppression = _suppression(worker)
    found = {}
    for block, site in suppression.sites.items():
        calls, site.witness, site.watched = site.witness or [], None, None
        found[block] = _compare(calls, site.tensors)
    return found


def _compare(calls: list[tuple[Tensor, Tensor, Tensor]], tensors: SiteTensors) -> dict[str, Any]:
    tokens, fired, moved, error, allowed, gates = 0, 0, False, 0.0, 0.0, hashlib.sha256()
    for before, after, rows in calls:
        if not len(rows):
            continue
        x, y = before.double(), after.double()
        wanted = x.clone()
        reference.suppress_(wanted, rows, tensors)
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
