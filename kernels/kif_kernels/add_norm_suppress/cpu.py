"""The fused operators on the CPU: the reference's own steps, with the fast path's edits of the few tokens that fire."""

from functools import partial

from torch import Tensor

from ..layout import Candidates, SiteTensors
from ..suppress.cpu import edits, suppress_
from ..suppress.reference import flatten, write
from . import reference

add_norm_suppress_ = partial(reference.add_norm_suppress_, suppress_=suppress_)


def suppress_normed_(
    normed: Tensor,
    residual: Tensor,
    rows: Tensor,
    site: SiteTensors,
    weight: Tensor,
    epsilon: float,
    one_plus: bool,
    hits: Tensor | None,
    candidates: Candidates | None,
) -> None:
    """Mostly nothing fires, and then nothing is computed but the screen."""
    edited = edits(residual, rows, site, hits, candidates)
    if edited is None:
        return
    token, x = edited
    changed = (x != flatten(residual, rows)[0][token]).any(-1)
    token, x = token[changed], x[changed]
    write(residual, token, x.to(residual.dtype))
    write(normed, token, reference.norm(x, weight, epsilon, one_plus, normed.dtype))
