"""Where the gate opens: the score of every signature on every token of a prompt, relative to its decision."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kif_hf import attach
from kif_kernels import scores
from kif_runtime import Capsule, CapsuleBank
from kif_runtime.blocks import decoder_blocks, width

from .answers import encode


@dataclass(frozen=True)
class Line:
    """One signature over a prompt. `scores` [T] are relative to the decision: over 0 it fires. `typical` is the score
    that the subject's own tokens usually have, as mining stored it: what makes scores of different signatures alike.
    """

    capsule: str
    number: int
    site: int
    role: str
    scores: list[float]
    typical: float

    @property
    def label(self) -> str:
        return f"block {self.site}, {self.role}"


@dataclass(frozen=True)
class Trace:
    """A prompt's tokens as text, and what every signature scored on them."""

    prompt: str
    tokens: list[str]
    lines: list[Line]

    def best(self, token: int) -> Line:
        """The signature that is nearest to firing, or fires most, on a token."""
        return max(self.lines, key=lambda line: line.scores[token] / line.typical)

    @property
    def fired(self) -> list[bool]:
        return [any(line.scores[t] > 0 for line in self.lines) for t in range(len(self.tokens))]


def trace(
    model: Any,
    tokenizer: Any,
    capsules: Sequence[Capsule],
    prompts: Sequence[str],
    *,
    chat: bool = False,
    max_false_fire: float | None = None,
) -> list[Trace]:
    """One trace per prompt, each run alone and with all capsules attached: later sites see what earlier ones left."""
    blocks = decoder_blocks(model)
    bank = CapsuleBank.for_capsules(capsules, width=width(model), device=model.device, max_false_fire=max_false_fire)
    encoded = [encode(model, tokenizer, prompt, chat=chat) for prompt in prompts]
    result = []
    with _incoming(blocks, bank.sites) as states, attach(model, capsules, bank=bank), torch.inference_mode():
        for prompt, ids in zip(prompts, encoded, strict=True):
            model(input_ids=ids, use_cache=False)
            tokens = [tokenizer.decode([token]) for token in ids[0].tolist()]
            result.append(Trace(prompt, tokens, _lines(capsules, bank, states)))
    return result


def _lines(capsules: Sequence[Capsule], bank: CapsuleBank, states: dict[int, Tensor]) -> list[Line]:
    found: dict[tuple[str, int], list[float]] = {}
    for site in bank.sites:
        table = scores(states[site], bank.site(site)).T.tolist()
        slots = [
            (c.id, n) for c in capsules for n, s in enumerate(c.signatures) if s.site == site
        ]  # as they were added
        found |= dict(zip(slots, table, strict=True))
    return [
        Line(c.id, n, s.site, s.role, relative, _typical(s.calibration, relative))
        for c in capsules
        for n, s in enumerate(c.signatures)
        for relative in [[score - (s.tau or 0.0) for score in found[c.id, n]]]
    ]


def _typical(calibration: dict[str, Any], relative: list[float]) -> float:
    positives = calibration.get("positives") or [0.0]
    return max(median(positives), 0.0) or median(map(abs, relative)) or 1.0


@contextmanager
def _incoming(blocks: Any, sites: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What the blocks at `sites` give [T, D] in each forward, before anything attached inside this block edits it.

    A forward hook would come too late: capsules edit a block's output in place, inside its forward.
    """
    states: dict[int, Tensor] = {}

    def watch(site: int) -> None:
        inner = blocks[site].forward

        def forward(*args: Any, **options: Any) -> Any:
            output = inner(*args, **options)
            hidden = output[0] if isinstance(output, tuple) else output
            states[site] = hidden[0].detach().clone()
            return output

        blocks[site].forward = forward

    own = {site: blocks[site].__dict__["forward"] for site in sites if "forward" in blocks[site].__dict__}
    try:
        for site in sites:
            watch(site)
        yield states
    finally:
        for site in sites:
            blocks[site].__dict__.pop("forward", None)
            if site in own:
                blocks[site].__dict__["forward"] = own[site]
