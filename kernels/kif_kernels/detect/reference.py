"""What `detect` must find, in plain PyTorch: exactly the signatures that fire, in the order of the token's set.

Fast paths may list more, in any order; never less. Work is in fp32, or in float64 for float64 input.
"""

import torch
from torch import Tensor

from ..layout import Candidates, SiteTensors
from ..suppress.reference import flatten, gate, normalise, score


def detect(x: Tensor, rows: Tensor, site: SiteTensors, candidates: Candidates, residual: Tensor | None = None) -> None:
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.to(work) if residual is None else x.to(work) + residual.to(work)
    tokens, token_rows = flatten(x, rows)
    limit = candidates.found.shape[1]
    for n, row in enumerate(token_rows.tolist()):
        places = firing(tokens[n], row, site)
        candidates.count[n] = len(places)
        candidates.found[n, : len(places)] = torch.tensor(places[:limit], dtype=torch.int32)


def firing(token: Tensor, row: int, site: SiteTensors) -> list[int]:
    """The places in capsule set `row` of the signatures with a gate over 0 on one token [D], ascending."""
    slots = [] if row < 0 else [s for s in site.sets[row].tolist() if s >= 0]
    v = normalise(token[None])[2]
    weights = [
        gate(
            score(v, site.detector[s].to(v.dtype), site.bias[s].to(v.dtype)),
            site.k[s].to(v.dtype),
            site.tau[s].to(v.dtype),
        )[0]
        for s in slots
    ]
    return [place for place, weight in enumerate(weights) if weight > 0]
