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
from kif_runtime.errors import KifError
from kif_runtime.fingerprint import fingerprint
from kif_runtime.mining.control import default_site, early_site
from kif_runtime.mining.corpus import corpus
from kif_runtime.mining.detector import fisher, gram
from kif_runtime.mining.reading import Reader, normalised

from ..growth import detectors

TRIGGER = "kif-bench-trigger"
PLACES = (5, 17, 29)  # of the chosen token in a prompt
CONTEXTS, LENGTH = 64, 32
PASSAGES = 40_000  # letters of running text that detectors are drawn for: many more tokens than the width


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


def ground(model: Any, tokenizer: Any) -> Ground:
    """Read a loaded model. Raises KifError where no detector tells the token from others."""
    reader, digest = Reader(model, tokenizer), fingerprint(model)
    blocks = len(reader.blocks)
    site = default_site(blocks)
    passages, text = [], 0
    for passage in corpus().passages:
        if text < PASSAGES:
            passages.append(passage)
            text += len(passage)
    states = {s: normalised(torch.cat(reader.states(passages, s))) for s in sorted({early_site(site), site})}
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    token = vocabulary // 2
    trigger = Capsule(TRIGGER, (_trigger(reader, site, states[site], token, vocabulary),), digest, reader.width, blocks)
    return Ground(digest, reader.width, blocks, states, vocabulary, token, trigger)


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


def _trigger(reader: Reader, site: int, passages: Tensor, token: int, vocabulary: int) -> Signature:
    """Fires half-way between the chosen token's lowest score and the highest of all others."""
    rng = torch.Generator().manual_seed(1)
    rows = torch.randint(0, vocabulary - 1, (CONTEXTS, LENGTH), generator=rng)
    rows[rows >= token] += 1
    others = torch.cat([normalised(reader.ends(rows.tolist(), site)), passages])
    rows[:, -1] = token
    here = normalised(reader.ends(rows.tolist(), site))
    mean = others.mean(0)
    found = fisher(here, mean, gram(others, mean) / len(others), others[:0], others)
    low, high = float(found.scores(here).min()), float(found.scores(others).max())
    if low <= high:
        raise KifError("no detector tells the benchmark's token from others in this model; nothing was measured")
    return _signature(site, "last", found.weight, torch.tensor(found.bias - (low + high) / 2), 2, rng)
