"""Random sites, and the operator once more in float64 numpy, written from the equation alone."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from kif_kernels import SiteTensors

MakeSite = Callable[..., SiteTensors]


@pytest.fixture
def make_site() -> MakeSite:
    """make_site(width, signatures, sets, gate=, rank=, bias=, free=, seed=): random signatures in the first slots."""

    def build(
        width: int,
        signatures: int,
        sets: Sequence[Sequence[int]],
        *,
        gate: str = "hard",
        rank: int = 3,
        bias: float = -0.5,
        affine: bool = True,
        free: int = 2,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> SiteTensors:
        g = torch.Generator().manual_seed(seed)
        n = signatures
        site = SiteTensors.empty(
            width=width,
            signatures=n + free,
            rank=rank + 1,
            rows=len(sets),
            set_length=max(1, *map(len, sets)),
            dtype=dtype,
        )
        rank = min(rank, width)
        site.detector[:n] = torch.randn(n, width, generator=g) / width**0.5
        site.bias[:n] = bias + 0.1 * torch.randn(n, generator=g)
        if n:
            bases = torch.linalg.qr(torch.randn(n, width, rank, generator=g)).Q.mT
            site.basis[:n, :rank] = bases.to(dtype)
            site.target[:n, :rank] = affine * torch.randn(n, rank, generator=g)
        site.strength[:n] = 0.5 + 0.5 * torch.rand(n, generator=g)
        for slot in range(n):
            if gate == "soft" or (gate == "mixed" and slot % 2):
                site.k[slot], site.tau[slot] = 3.0, 0.2
        site.owner[:n] = torch.arange(n) // 2
        site.used.fill_(n)
        site.write_screen(slice(0, n))
        for row, slots in enumerate(sets):
            site.write_set(row, slots)
        site.check()
        return site

    return build


@pytest.fixture
def in_numpy() -> Callable[[Tensor, Sequence[int], SiteTensors], tuple[np.ndarray, np.ndarray]]:
    """in_numpy(x [N, D], rows, site) -> (new x, hits [N, owners]) in float64; refuses scores near a decision."""

    def compute(x: Tensor, rows: Sequence[int], site: SiteTensors) -> tuple[np.ndarray, np.ndarray]:
        w, b, basis, target, strength, k, tau = (
            t.double().numpy()
            for t in (site.detector, site.bias, site.basis, site.target, site.strength, site.k, site.tau)
        )
        out = x.double().numpy().copy()
        hits = np.zeros((len(out), max(1, int(site.owner.max()) + 1)), dtype=bool)
        for n, row in enumerate(rows):
            if row < 0:
                continue
            before = out[n].copy()
            direction = before / np.sqrt(np.mean(before**2) + 1e-6)
            for s in site.sets[row].tolist():
                if s < 0:
                    break
                score = w[s] @ direction + b[s]
                if np.isinf(k[s]):
                    assert abs(score) > 1e-5, "choose another seed"
                    g = float(score > 0)
                else:
                    g = 1 / (1 + np.exp(-k[s] * (score - tau[s])))
                    assert min(abs(g - 2**-10), abs(g - 0.5)) > 1e-6, "choose another seed"
                    g = g if g >= 2**-10 else 0.0
                out[n] -= strength[s] * g * basis[s].T @ (basis[s] @ out[n] - target[s])
                hits[n, site.owner[s]] |= g >= 0.5
        return out, hits

    return compute
