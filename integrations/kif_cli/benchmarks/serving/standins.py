"""Capsules for measuring: one that fires on a chosen token, and as many as wanted of the form that mining gives.

Detectors of the latter are drawn as `growth.detectors` says. Nothing is claimed of what they would make a model forget;
they take the time and the room of mined ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kif_runtime import Capsule, Signature
from kif_runtime.blocks import decoder_blocks, width
from kif_runtime.errors import KifError
from kif_runtime.fingerprint import fingerprint
from kif_runtime.mining.control import default_site, early_site
from kif_runtime.mining.detector import fisher, gram

from ..growth import detectors, other_states

TRIGGER = "kif-bench-trigger"
PLACES = (5, 17, 29)  # of the chosen token in a prompt
PROMPTS, LENGTH = 32, 64


@dataclass(frozen=True)
class Ground:
    """What capsules are made from. states: site → [T, D], RMS-normalised, of passages. token: what the trigger sees."""

    fingerprint: str
    width: int
    blocks: int
    states: dict[int, Tensor]
    vocabulary: int
    token: int
    trigger: Capsule


@torch.inference_mode()
def ground(model: Any, tokenizer: Any) -> Ground:
    """Read a loaded model. Raises KifError where no detector tells the token from others."""
    blocks, dim, digest = len(decoder_blocks(model)), width(model), fingerprint(model)
    site = default_site(blocks)
    states = {s: _normalised(other_states(model, tokenizer, s)) for s in sorted({early_site(site), site})}
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    token = vocabulary // 2
    signature = _trigger(model, site, states[site], token, vocabulary)
    trigger = Capsule(TRIGGER, (signature,), digest, dim, blocks)
    return Ground(digest, dim, blocks, states, vocabulary, token, trigger)


def prompt(rng: torch.Generator, length: int, ground: Ground, touched: bool) -> list[int]:
    """`length` random token ids; the trigger's token is among them, up to three times, only where `touched`."""
    ids = torch.randint(0, ground.vocabulary - 1, (length,), generator=rng)
    ids[ids >= ground.token] += 1
    if touched:
        ids[[p for p in PLACES if p < length] or [length - 1]] = ground.token
    return ids.tolist()


def drawn(ground: Ground, count: int, seed: int = 0) -> Iterator[Capsule]:
    """`count` capsules of the form usual for a name of three tokens: two early signatures of rank 1, one of rank 2."""
    rng = torch.Generator().manual_seed(seed)
    early, last = min(ground.states), max(ground.states)
    rows = {early: detectors(ground.states[early], 2 * count, rng), last: detectors(ground.states[last], count, rng)}
    for number in range(count):
        parts = [(early, "early", 2 * number, 1), (early, "early", 2 * number + 1, 1), (last, "last", number, 2)]
        signatures = tuple(
            _signature(site, role, rows[site][0][row], rows[site][1][row], rank, rng) for site, role, row, rank in parts
        )
        yield Capsule(f"drawn-{number}", signatures, ground.fingerprint, ground.width, ground.blocks)


def _signature(site: int, role: str, detector: Tensor, bias: Tensor, rank: int, rng: torch.Generator) -> Signature:
    basis = torch.linalg.qr(torch.randn(len(detector), rank, generator=rng, dtype=torch.float64)).Q.mT.float()
    one = torch.ones(())
    return Signature(site, role, detector.clone(), bias.clone(), basis.contiguous(), torch.zeros(rank), one)


def _trigger(model: Any, site: int, passages: Tensor, token: int, vocabulary: int) -> Signature:
    """Fires half-way between the chosen token's lowest score and the highest of all others."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary - 1, (PROMPTS, LENGTH), generator=rng)
    ids[ids >= token] += 1
    ids[:, list(PLACES)] = token
    hidden = model(ids.to(model.device), output_hidden_states=True).hidden_states[site + 1].float().cpu()
    states, here = _normalised(hidden.flatten(0, 1)), (ids == token).flatten()
    others = torch.cat([states[~here], passages])
    mean = others.mean(0)
    none = others[:0]
    found = fisher(states[here], mean, gram(others, mean) / len(others), none, others)
    low, high = float(found.scores(states[here]).min()), float(found.scores(others).max())
    if low <= high:
        raise KifError("no detector tells the benchmark's token from others in this model; nothing was measured")
    return _signature(site, "last", found.weight, torch.tensor(found.bias - (low + high) / 2), 2, rng)


def _normalised(states: Tensor) -> Tensor:
    return states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
