"""The operator on the CPU: screen with one matrix product, decide the few candidates in fixed order, edit what fired.

The screen only rules out. Its floor is lowered by the signature's margin, which bounds every rounding difference
between it and the decision, so no hit is missed and no decision depends on the other tokens. Meaning and order are the
reference's.
"""

from math import exp
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import LOG_1023, Candidates, SiteTensors, gamma
from .reference import EPSILON, flatten, normalise, ordered_sum, removed, write

# Elements of a temporary: what is gathered or screened at once stays in the cache's neighbourhood.
SCREEN_BLOCK, GATHER_BLOCK = 1 << 18, 1 << 18
# Below this sum of squares nothing overflows; above it, or with NaN, the screen normalises the careful way.
SAFE_SQUARE = 2.0**100
_LOG_1023 = torch.tensor(LOG_1023, dtype=torch.float32)
_NOTHING = torch.empty(0, dtype=torch.long)


class _Sets(NamedTuple):
    """The non-empty capsule sets of one call. `row` [m] long: their rows; `slots` [m, L] int32, -1 padded."""

    row: Tensor
    slots: Tensor
    everywhere: bool  # whether every token has one of them


def suppress_(
    x: Tensor, rows: Tensor, site: SiteTensors, hits: Tensor | None = None, candidates: Candidates | None = None
) -> None:
    """`kif_kernels.suppress_` for fp16, bf16 and fp32 tensors on the CPU."""
    if x.numel() == 0 or (sets := _sets_in_use(rows, site)) is None:
        return
    tokens, token_rows = flatten(x, rows)
    among = None if sets.everywhere else torch.isin(token_rows, sets.row).nonzero().squeeze(-1)
    token, slot = _screen(tokens, among, site, _columns(sets, site))
    if token.numel():
        _suppress_candidates(x, tokens, token_rows, token, slot, site, sets, hits)


def _sets_in_use(rows: Tensor, site: SiteTensors) -> _Sets | None:
    named = set(rows.tolist())
    chosen = [row for row in named if row >= 0]
    if not chosen:
        return None
    slots = site.sets[chosen] if len(chosen) > 1 else site.sets[chosen[0] : chosen[0] + 1]
    filled = slots[:, 0].tolist()  # a set's slots come first
    kept = [i for i, first in enumerate(filled) if first >= 0]
    if not kept:
        return None
    if len(kept) < len(chosen):
        slots = slots[kept]
    return _Sets(torch.tensor([chosen[i] for i in kept]), slots, len(kept) == len(named))


def _columns(sets: _Sets, site: SiteTensors) -> Tensor | slice:
    """The slots to screen: all live ones, unless the sets name so few that gathering them is cheaper."""
    live = int(site.used)
    half = live // 2
    if half < sets.slots.shape[1] and int(sets.slots[:, half].max()) >= 0:  # a set names more than half of them
        return slice(0, live)
    listed = sets.slots[sets.slots >= 0].unique()
    return listed.long() if listed.numel() <= half else slice(0, live)


def _screen(tokens: Tensor, among: Tensor | None, site: SiteTensors, columns: Tensor | slice) -> tuple[Tensor, Tensor]:
    """Pairs (token [P], slot [P]) that may fire: all that do, and few that do not."""
    detector, floor = site.detector[columns], _floor(site, columns)
    count = tokens.shape[0] if among is None else among.shape[0]
    step = max(1, SCREEN_BLOCK // max(detector.shape))
    found = []
    for start in range(0, count, step):
        block = tokens[start : start + step] if among is None else tokens[among[start : start + step]]
        above = (
            _above_one(block.float(), detector, floor) if len(block) == 1 else _above(block.float(), detector, floor)
        )
        if above is not None:
            found.append(above + above.new_tensor([start, 0]))
    if not found:
        return _NOTHING, _NOTHING
    token, column = torch.cat(found).unbind(1)
    token = token if among is None else among[token]
    return token, column if isinstance(columns, slice) else columns[column]


def _floor(site: SiteTensors, columns: Tensor | slice) -> Tensor:
    """What is added to w·v so that a sum over 0 is a candidate, [S']."""
    margin = site.margin[columns]
    widening = _widening(site.detector.shape[1])
    if widening != 1.0:
        margin = margin * widening
    return torch.addcdiv(margin, _LOG_1023, site.k[columns]).add_(site.bias[columns]).sub_(site.tau[columns])


def _above(x: Tensor, detector: Tensor, floor: Tensor) -> Tensor | None:
    """x [N, D] fp32 -> (token, column) of the candidates, [P, 2], or None."""
    square = (x * x).sum(-1, keepdim=True)
    if bool((square < SAFE_SQUARE).all()):
        v = x * square.div_(x.shape[-1]).add_(EPSILON).rsqrt_()
    else:
        v = normalise(x)[2]
    above = (torch.addmm(floor, v, detector.t()) > 0).nonzero()
    return above if above.numel() else None


def _above_one(x: Tensor, detector: Tensor, floor: Tensor) -> Tensor | None:
    """`_above` for one token [1, D], as in decoding, where the number of calls is what costs."""
    token = x[0]
    square = float(torch.dot(token, token))
    if not square < SAFE_SQUARE:
        return _above(x, detector, floor)
    reduced = torch.addmv(floor, detector, token, alpha=(square / x.shape[-1] + EPSILON) ** -0.5)
    return (reduced.unsqueeze(0) > 0).nonzero() if float(reduced.max()) > 0 else None


def _widening(width: int) -> float:
    """The margin's growth where the user allows fp32 products in bf16 or TF32; 2⁻⁵ bounds truncated bf16."""
    backend = getattr(torch.backends.mkldnn, "matmul", None)
    full = (
        getattr(backend, "fp32_precision", "none") in ("none", "ieee")
        and torch.get_float32_matmul_precision() == "highest"
    )
    return 1.0 if full else 1.0 + 2.0**-6 / gamma(width)


def _suppress_candidates(
    x: Tensor,
    tokens: Tensor,
    rows: Tensor,
    token: Tensor,
    slot: Tensor,
    site: SiteTensors,
    sets: _Sets,
    hits: Tensor | None,
) -> None:
    """Decide the pairs (token [P], slot [P]) and edit x, [N, D] or [B, T, D]; `tokens` and `rows` are its flat form."""
    place = _places(rows[token], slot, site, sets)
    member = place >= 0
    token, slot, place = token[member], slot[member], place[member]
    distinct, at = token.unique(return_inverse=True)
    y, scale, v = normalise(tokens[distinct].float())
    z, hit, fires = _decide(v, at, slot, site)
    if hits is not None:
        hits[token[hit], site.owner[slot[hit]].long()] = True
    at, slot, place, z = at[fires], slot[fires], place[fires], z[fires]
    if at.numel() == 0:
        return
    order = (at * site.sets.shape[1] + place).argsort()
    at, slot = at[order], slot[order]
    _edit(y, scale, at, slot, _weight(z[order], site.k[slot]) * site.strength[slot], site)
    touched = at.unique()
    write(x, distinct[touched], (y[touched] / scale[touched]).to(x.dtype))


def _places(row: Tensor, slot: Tensor, site: SiteTensors, sets: _Sets) -> Tensor:
    """The position of each slot in the canonical order of its row's set, -1 where it is not in it. All [P]."""
    table = torch.full((len(sets.row), site.detector.shape[0]), -1)
    which, position = (sets.slots >= 0).nonzero(as_tuple=True)
    table[which, sets.slots[which, position].long()] = position
    if len(sets.row) == 1:
        return table[0, slot]
    local = torch.full((site.sets.shape[0],), -1)
    local[sets.row] = torch.arange(len(sets.row))
    return table[local[row.long()], slot]


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
