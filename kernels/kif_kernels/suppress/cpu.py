"""The operator on the CPU: screen with one matrix product, decide the few candidates in fixed order, edit what fired.

The screen only rules out. Its floor is lowered by the signature's margin, which bounds every rounding difference
between it and the decision, so no hit is missed and no decision depends on the other tokens. Meaning and order are the
reference's.
"""

from math import exp

import torch
from torch import Tensor

from ..layout import LOG_1023, Candidates, SiteTensors
from .cpu_screen import Pairs, may_fire
from .reference import flatten, normalise, ordered_sum, removed, write

# Elements of a temporary: what is gathered at once stays in the cache's neighbourhood.
GATHER_BLOCK = 1 << 18


def suppress_(
    x: Tensor, rows: Tensor, site: SiteTensors, hits: Tensor | None = None, candidates: Candidates | None = None
) -> None:
    """`kif_kernels.suppress_` for fp16, bf16 and fp32 tensors on the CPU."""
    edited = edits(x, rows, site, hits, candidates)
    if edited is not None:
        token, value = edited
        write(x, token, value.to(x.dtype))


def edits(
    x: Tensor, rows: Tensor, site: SiteTensors, hits: Tensor | None, candidates: Candidates | None
) -> tuple[Tensor, Tensor] | None:
    """The tokens of x on which something fires, [F] ascending, and what they become, [F, D] fp32; None where nothing
    does. Marks `hits` [N, C].
    """
    if x.numel() == 0:
        return None
    tokens, token_rows = flatten(x, rows)
    if candidates is None:
        pairs = may_fire(tokens, rows, token_rows, site)
    else:
        pairs = _listed(candidates, token_rows, site)
    if pairs.token.numel() == 0:
        return None
    return _edited(tokens, token_rows, pairs, site, hits)


def _listed(candidates: Candidates, rows: Tensor, site: SiteTensors) -> Pairs:
    """The pairs that `detect` listed; of a token whose list overflowed, its whole set."""
    limit = candidates.found.shape[1]
    there = torch.arange(limit) < candidates.count.unsqueeze(-1)
    overflowed = candidates.count > limit
    token, entry = (there & ~overflowed.unsqueeze(-1)).nonzero(as_tuple=True)
    slot = site.sets[rows[token].long(), candidates.found[token, entry].long()]
    over = overflowed.nonzero().squeeze(-1)
    if over.numel():
        whole = site.sets[rows[over].long()]
        again, place = (whole >= 0).nonzero(as_tuple=True)
        token, slot = torch.cat([token, over[again]]), torch.cat([slot, whole[again, place]])
    return Pairs(token, slot.long())


def _edited(
    tokens: Tensor, rows: Tensor, pairs: Pairs, site: SiteTensors, hits: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Decide the pairs, each of its token's set; what `edits` gives for tokens [N, D]."""
    token, slot = pairs
    distinct, at = token.unique(return_inverse=True)
    y, scale, v = normalise(tokens[distinct].float())
    z, hit, fires = _decide(v, at, slot, site)
    if hits is not None:
        hits[token[hit], site.owner[slot[hit]].long()] = True
    token, at, slot, z = token[fires], at[fires], slot[fires], z[fires]
    if at.numel() == 0:
        return None
    order = (at * site.sets.shape[1] + site.place[rows[token].long(), slot]).argsort()
    at, slot = at[order], slot[order]
    _edit(y, scale, at, slot, _weight(z[order], site.k[slot]) * site.strength[slot], site)
    touched = at.unique()
    return distinct[touched], y[touched] / scale[touched]


def _decide(v: Tensor, at: Tensor, slot: Tensor, site: SiteTensors) -> tuple[Tensor, Tensor, Tensor]:
    """v [F, D] and pairs (at [P] into v, slot [P]) -> the gate's argument, weight ≥ 1/2, weight > 0; each [P]."""
    step = max(1, GATHER_BLOCK // v.shape[1])
    pieces = [
        ordered_sum(v[a] * site.detector[s]) + site.bias[s]
        for a, s in zip(at.split(step), slot.split(step), strict=True)
    ]
    score = torch.cat(pieces) if pieces else v.new_empty(0)
    k, tau = site.k[slot], site.tau[slot]
    hard = k.isinf()
    z = torch.where(hard, score, k * (score - tau))
    return z, torch.where(hard, z > 0, z >= 0), torch.where(hard, z > 0, z >= -LOG_1023)


def _weight(z: Tensor, k: Tensor) -> Tensor:
    """1 for hard gates, sigmoid(z) for soft ones, [P].

    One value at a time: a vectorised exp rounds differently in a vector's tail, so the weight would depend on how many
    fire.
    """
    soft = (~k.isinf()).nonzero().squeeze(-1)
    weight = torch.ones_like(z)
    weight[soft] = torch.tensor([1.0 / (1.0 + exp(-value)) for value in z[soft].tolist()], dtype=z.dtype)
    return weight


def _edit(y: Tensor, scale: Tensor, at: Tensor, slot: Tensor, amount: Tensor, site: SiteTensors) -> None:
    """Update y [F, D] in place. Pairs are sorted by `at`, then canonical order: the n-th of each token together."""
    turn = torch.arange(len(at)) - torch.searchsorted(at, at)
    step = max(1, GATHER_BLOCK // site.basis[0].numel())
    for n in range(int(turn.max()) + 1):
        for pair in (turn == n).nonzero().squeeze(-1).split(step):
            i, s = at[pair], slot[pair]
            before = y[i]
            y[i] = before - removed(before, site.basis[s].float(), site.target[s] * scale[i], amount[pair])
