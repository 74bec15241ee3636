"""The screen on the CPU: which signatures may fire on which tokens, from one matrix product.

It only rules out: everything that fires is let through, and what it lets through is decided again in fixed order. Two
products serve. A few detectors are multiplied in fp32, under the margin of `screening_margin`. Many are multiplied in 8
bits, in whole numbers and therefore exactly, at a quarter of the memory and of the time, under the bound of `sketched`;
the pairs that are left are multiplied in fp32 after that, one by one, so that mostly there is nothing to decide.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import LOG_1023, SiteTensors, gamma
from .reference import EPSILON, normalise

# How many detectors, and how wide ones, are multiplied in 8 bits. (For a width of 1 torch's product is wrong there: it
# takes the detectors for their transpose.)
SKETCH_FROM, NARROW = 128, 32
# Elements of a block of products, or of what is gathered at once, which stays in the cache's neighbourhood; in 8 bits,
# tokens of a block: the product packs its detectors at every call, so that each call should serve many tokens.
BLOCK, SKETCH_TOKENS = 1 << 18, 512
# Below this norm no square overflows; above it, or with NaN, a token is normalised the careful way.
SAFE_NORM = 2.0**50
_LOG_1023 = torch.tensor(LOG_1023, dtype=torch.float32)
_NOTHING = torch.empty(0, dtype=torch.long)


class Pairs(NamedTuple):
    """Tokens and signatures that belong together: token [P], slot [P], long."""

    token: Tensor
    slot: Tensor


def may_fire(tokens: Tensor, rows: Tensor, token_rows: Tensor, site: SiteTensors) -> Pairs:
    """tokens [N, D], rows: the capsule sets in use, token_rows [N] -> all pairs that fire, and few that do not.

    Tokens ascend.
    """
    named = set(rows.tolist())
    kept = [row for row in named if row >= 0 and int(site.sets[row, 0]) >= 0]  # a set's slots come first
    if not kept:
        return Pairs(_NOTHING, _NOTHING)
    among = None
    if len(kept) < len(named):
        among = torch.isin(token_rows, torch.tensor(kept, dtype=torch.int32)).nonzero().squeeze(-1)
    pairs = _above(tokens if among is None else tokens[among], site, _columns(kept, site))
    token = pairs.token if among is None else among[pairs.token]
    if token.numel() == 0:
        return pairs
    member = site.place[token_rows[token].long(), pairs.slot] >= 0
    return Pairs(token[member], pairs.slot[member])


def _columns(rows: list[int], site: SiteTensors) -> Tensor | slice:
    """The slots to screen: all live ones, unless the sets name so few that gathering them is cheaper."""
    live = int(site.used)
    half = live // 2
    longest = site.sets.shape[1]
    if half < longest and any(int(site.sets[row, half]) >= 0 for row in rows):  # a set names more than half of them
        return slice(0, live)
    sets = site.sets[rows]
    listed = sets[sets >= 0].unique()
    return listed.long() if listed.numel() <= half else slice(0, live)


def _above(tokens: Tensor, site: SiteTensors, columns: Tensor | slice) -> Pairs:
    floor = _floor(site, columns)
    screen: _Product | _Sketch
    if _many(len(tokens), len(floor)) and site.detector.shape[1] >= NARROW and exact_in_8_bits():
        screen, step = _Sketch(site, columns, floor), SKETCH_TOKENS
    else:
        screen = _Product(site, columns, floor)
        step = max(1, BLOCK // max(len(floor), site.detector.shape[1]))
    found = []
    for start in range(0, len(tokens), step):
        above = screen.above(tokens[start : start + step].float())
        if above is not None:
            found.append(above + above.new_tensor([start, 0]))
    if not found:
        return Pairs(_NOTHING, _NOTHING)
    token, column = torch.cat(found).unbind(1)
    return Pairs(token, _slot(column, columns))


def _slot(column: Tensor, columns: Tensor | slice) -> Tensor:
    """The slots that are screened in these columns."""
    return column if isinstance(columns, slice) else columns[column]


def _many(tokens: int, signatures: int) -> bool:
    """Whether 8 bits are quicker in spite of their longer preparation, by trial on two cores of an AMD EPYC."""
    return signatures >= SKETCH_FROM and signatures * (tokens + 3) >= 64 * SKETCH_FROM


def _floor(site: SiteTensors, columns: Tensor | slice) -> Tensor:
    """What is added to w·v so that a sum over 0 may fire, [S']."""
    margin = site.margin[columns]
    widening = _widening(site.detector.shape[1])
    if widening != 1.0:
        margin = margin * widening
    return torch.addcdiv(margin, _LOG_1023, site.k[columns]).add_(site.bias[columns]).sub_(site.tau[columns])


def _widening(width: int) -> float:
    """The margin's growth where the user allows fp32 products in bf16 or TF32; 2⁻⁵ bounds truncated bf16."""
    backend = getattr(torch.backends.mkldnn, "matmul", None)
    try:
        full = (
            getattr(backend, "fp32_precision", "none") in ("none", "ieee")
            and torch.get_float32_matmul_precision() == "highest"
        )
    except RuntimeError:  # torch does not tell where its newer setting is in use, as for CUDA alone
        full = False
    return 1.0 if full else 1.0 + 2.0**-6 / gamma(width)


def _normalised(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if float(norm.max()) < SAFE_NORM:
        return x * norm.square_().div_(x.shape[-1]).add_(EPSILON).rsqrt_()
    return normalise(x)[2]


class _Product:
    """w·v in fp32."""

    def __init__(self, site: SiteTensors, columns: Tensor | slice, floor: Tensor) -> None:
        self.detector, self.floor = site.detector[columns], floor

    def above(self, x: Tensor) -> Tensor | None:
        """x [N, D] fp32 -> (token, column) of what may fire, [P, 2], or None."""
        if len(x) == 1:
            return self._above_one(x)
        above = (torch.addmm(self.floor, _normalised(x), self.detector.t()) > 0).nonzero()
        return above if above.numel() else None

    def _above_one(self, x: Tensor) -> Tensor | None:
        """For one token, as in decoding, where the number of calls is what costs."""
        token = x[0]
        square = float(torch.dot(token, token))
        if square < SAFE_NORM**2:
            scale = (square / x.shape[-1] + EPSILON) ** -0.5
            reduced = torch.addmv(self.floor, self.detector, token, alpha=scale)
        else:
            reduced = torch.addmv(self.floor, self.detector, normalise(x)[2][0])
        return (reduced.unsqueeze(0) > 0).nonzero() if float(reduced.max()) > 0 else None


class _Sketch:
    """The bound c·a·(q·p) + c·‖q‖·‖δ‖ + ‖w − c·q‖·√D of `sketched`, over a·c > 0: [q·p] + (‖δ‖/a)·‖q‖ + (1/a)·floor/c.

    The whole-number product needs no margin, so what `screening_margin` allows an fp32 product, γ_D, is free for the
    roundings here: ‖δ‖ (a sum of squares, γ_D/2, and 2u·√D for its terms) and a few of each later step.
    """

    def __init__(self, site: SiteTensors, columns: Tensor | slice, floor: Tensor) -> None:
        self.sketch, self.floor, self.detector, self.columns = site.sketch[columns].t(), floor, site.detector, columns
        self.terms = torch.stack([site.length[columns], (floor + site.rest[columns]).div_(site.step[columns])])

    def above(self, x: Tensor) -> Tensor | None:
        """x [N, D] fp32 -> (token, column) of what may fire, [P, 2], or None. NaN may not."""
        v = _normalised(x)
        step = v.abs().amax(-1, keepdim=True).div_(127.0).clamp_min_(1e-30)
        p = (v / step).round_()
        error = torch.addcmul(v, p, step, value=-1.0).norm(dim=-1, keepdim=True)
        weights, p = torch.cat([error, torch.ones_like(error)], 1).div_(step), p.to(torch.int8)
        width = max(1, BLOCK // len(x))
        found = [self._above(p, weights, start, start + width) for start in range(0, self.sketch.shape[1], width)]
        kept = [above for above in found if above is not None]
        if not kept:
            return None
        above = self._refined(v, torch.cat(kept))
        return above[above[:, 0].argsort()] if above.numel() else None

    def _refined(self, v: Tensor, above: Tensor) -> Tensor:
        """Those pairs of tokens v [N, D] and detectors, of above [P, 2], that a product in fp32 lets through, too."""
        step = max(1, BLOCK // v.shape[1])
        over = []
        for token, column in (some.unbind(1) for some in above.split(step)):
            w = self.detector.index_select(0, _slot(column, self.columns))
            product = w.mul_(v.index_select(0, token)).sum(-1)
            over.append(product.add_(self.floor.index_select(0, column)) > 0)
        return above[torch.cat(over)]

    def _above(self, p: Tensor, weights: Tensor, start: int, stop: int) -> Tensor | None:
        """The same for tokens p [N, D] in 8 bits and the detectors from `start` to `stop`."""
        bound = torch._int_mm(p, self.sketch[:, start:stop]).float().addmm_(weights, self.terms[:, start:stop])
        tokens = (bound.amax(-1) > 0).nonzero().squeeze(-1)
        if tokens.numel() == 0:
            return None
        above = (bound[tokens] > 0).nonzero()
        return torch.stack([tokens[above[:, 0]], above[:, 1] + start], 1)


@cache
def exact_in_8_bits() -> bool:
    """Whether this machine has instructions for products of 8-bit numbers, and torch adds them up exactly.

    Without them, old kernels saturate sums of two products, and others are slower than fp32.
    """
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    if supported is None or not supported():
        return False
    extreme = torch.full((32, 576), 127, dtype=torch.int8)
    return bool((torch._int_mm(extreme, -extreme.t()) == -127 * 127 * 576).all())
