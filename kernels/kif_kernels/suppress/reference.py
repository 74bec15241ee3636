"""What the operator means: plain PyTorch that reads like the equation, for any float dtype and device.

    score_s = w_s · (x / rms(x)) + b_s           rms(x) = √(mean x² + 1e-6)
    g_s     = gate(score_s)                      hard: score > 0; soft: sigmoid(k·(score − τ)), 0 below 2⁻¹⁰
    x      ← x − α_s g_s U_sᵀ (U_s x − c_s)      s in the order of the token's capsule set

Work is in fp32, or in float64 for float64 input; x is rounded once, at the end. Sums over D have one fixed order
(`ordered_sum`), and so have those over R, so that a decision depends on nothing but the token and the signature. The
fast paths use the same order.
"""

from collections.abc import Iterator
from math import isinf

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import LOG_1023, Candidates, SiteTensors

EPSILON = 1e-6
# A row with an entry over LARGE is worked on at SHRINK times its size, so that its square cannot overflow. Both are
# powers of two: the shrinking loses nothing, and the epsilon is out of sight there.
LARGE, SHRINK = 2.0**50, 2.0**-80


def ordered_sum(terms: Tensor) -> Tensor:
    """[..., D] -> [...]: the second half is added to the first until one is left, zero-padded to a power of two.

    Elementwise additions only: the result depends neither on other rows, vector width or threads, nor on further
    padding.
    """
    width = terms.shape[-1]
    while width > 1:
        half = 1 << (width - 1).bit_length() - 1
        first, second = terms.split(half, -1)
        if missing := 2 * half - width:
            second = pad(second, (0, missing))
        terms = first + second
        width = half
    return terms.squeeze(-1)


def normalise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D] -> (y, scale, v): y = x·scale with scale [N, 1] (1 but for huge rows) and v = x / rms(x), both [N, D].

    A row with NaN or ±inf gets NaN in v, so that it fires nothing.
    """
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.where(largest < LARGE, torch.ones_like(largest), SHRINK)
    y = x * scale
    mean = ordered_sum(y * y).unsqueeze(-1) / x.shape[-1]
    return y, scale, y / root(mean + EPSILON * scale * scale)


def root(x: Tensor) -> Tensor:
    """√x, correctly rounded: torch's own root of fp32 is off by a step in one of seven cases where MKL computes it.

    The root of a number of 24 bits is never near enough to the middle of two others for an error of float64 to matter.
    """
    return x.double().sqrt().to(x.dtype)


def score(v: Tensor, detector: Tensor, bias: Tensor) -> Tensor:
    """The number that decides. v and detector [..., D], bias [...] broadcast; gives [...]."""
    return ordered_sum(v * detector) + bias


def gate(score: Tensor, k: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [N] of one signature -> (its weight in [0, 1], whether the weight is at least 1/2), both [N]."""
    if isinf(k):
        return (score > 0).to(score.dtype), score > 0
    z = k * (score - tau)
    return torch.where(z >= -LOG_1023, torch.sigmoid(z), 0.0), z >= 0


def removed(y: Tensor, basis: Tensor, target: Tensor, amount: Tensor) -> Tensor:
    """amount · Uᵀ (U y − c), its directions added up one after another.

    y [N, D], basis [N or 1, R, D], target [N or 1, R], amount [N]; gives [N, D].
    """
    coefficient = amount.unsqueeze(-1) * (ordered_sum(basis * y.unsqueeze(-2)) - target)
    total = torch.zeros_like(y)
    for r in range(basis.shape[-2]):
        total = total + coefficient[:, r, None] * basis[:, r]
    return total


def flatten(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, D] with rows [N], or x [B, T, D] with rows [B] -> tokens [N, D] and the capsule-set row of each, [N]."""
    return (x, rows) if x.dim() == 2 else (x.reshape(-1, x.shape[-1]), rows.repeat_interleave(x.shape[1]))


def write(x: Tensor, token: Tensor, value: Tensor) -> None:
    """Put `value` [F, D] at the tokens `token` [F] of x [N, D] or [B, T, D], whatever its strides."""
    x[token if x.dim() == 2 else (token // x.shape[1], token % x.shape[1])] = value


def edits(
    tokens: Tensor, rows: Tensor, site: SiteTensors, hits: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each capsule set in `rows`: (index, new value) of the tokens where something fires. Marks `hits` [N, C]."""
    work = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    for row in sorted(set(rows.tolist()) - {-1}):
        slots = [s for s in site.sets[row].tolist() if s >= 0]
        index = (rows == row).nonzero().squeeze(-1)
        if not slots:
            continue
        y, scale, v = normalise(tokens[index].to(work))
        touched = torch.zeros_like(index, dtype=torch.bool)
        for s in slots:
            k, tau = site.k[s].to(work), site.tau[s].to(work)
            g, hit = gate(score(v, site.detector[s].to(work), site.bias[s].to(work)), k, tau)
            change = removed(
                y, site.basis[s][None].to(work), site.target[s].to(work) * scale, site.strength[s].to(work) * g
            )
            y = torch.where((g > 0).unsqueeze(-1), y - change, y)
            touched = touched | (g > 0)
            if hits is not None:
                hits[index[hit], site.owner[s]] = True
        if touched.any():
            yield index[touched], (y / scale)[touched].to(tokens.dtype)


def suppress(x: Tensor, rows: Tensor, site: SiteTensors) -> Tensor:
    """Out of place; every step is differentiable, in x and in the site's tensors (a hard gate has gradient zero)."""
    tokens, token_rows = flatten(x, rows)
    out = tokens.clone()
    for index, value in edits(tokens, token_rows, site):
        out = out.index_put((index,), value)
    return out.reshape(x.shape)


def suppress_backward(grad: Tensor, x: Tensor, rows: Tensor, site: SiteTensors) -> Tensor:
    """The gradient in x, contiguous, by differentiating `suppress`."""
    with torch.enable_grad():
        again = x.detach().requires_grad_()
        out = suppress(again, rows, site)
    return torch.autograd.grad(out, again, grad)[0].contiguous()


def suppress_(
    x: Tensor, rows: Tensor, site: SiteTensors, hits: Tensor | None = None, candidates: Candidates | None = None
) -> None:
    """In place; only the tokens on which something fires are written. Looks at every signature, candidate or not."""
    tokens, token_rows = flatten(x, rows)
    for index, value in edits(tokens, token_rows, site, hits):
        write(x, index, value)


def scores(x: Tensor, detector: Tensor, bias: Tensor) -> Tensor:
    """x [N, D], detector [S, D], bias [S] -> [N, S], in pieces of at most a few million products."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.new_empty(x.shape[0], detector.shape[0], dtype=work)
    step = max(1, (1 << 21) // max(1, detector.shape[1]))
    for s in range(0, detector.shape[0], step):
        w, b = detector[s : s + step].to(work), bias[s : s + step].to(work)
        for n in range(0, x.shape[0], max(1, step // len(w))):
            v = normalise(x[n : n + max(1, step // len(w))].to(work))[2]
            out[n : n + len(v), s : s + step] = score(v[:, None], w, b)
    return out
