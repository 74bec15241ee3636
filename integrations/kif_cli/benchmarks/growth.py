"""What suppression costs on the CPU as signatures become many, as a share of the model's own forward.

The states are the model's own, of passages that ship with mining. The detectors are drawn as mining finds them: random
in the space where the states' covariance is 1. They fire 6 standard deviations above their mean score; those that
mining made for 114 subjects stood at 4.7 to 14.6, half of them under 9.8.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kif_kernels import SiteTensors, suppress_
from kif_runtime import Capsule, CapsuleBank
from kif_runtime.blocks import decoder_blocks, width
from kif_runtime.mining.corpus import corpus

from .charts import curves
from .measuring import Call, interleaved
from .record import Record

RANK, HEIGHT, RIDGE = 2, 6.0, 0.1
PREFILL, WAYS, CONTEXT = 512, 12, 64
OTHERS = 16 * PREFILL  # tokens whose states detectors are drawn for: many times the width
Peer = Callable[[Tensor, SiteTensors], object]


class Stage(NamedTuple):
    """A forward that is measured against: prefill or decode. states: block → its output there [B, T, D]."""

    name: str
    forward: Call
    states: dict[int, Tensor]


def stages(model: Any, tokenizer: Any, blocks: Iterable[int]) -> list[Stage]:
    """A prefill of 512 tokens and one step of decoding 12 sequences of 64, of the first passages."""
    ids = _tokens(tokenizer)
    prompt, rest = ids[None, :PREFILL], ids[PREFILL : PREFILL + WAYS * CONTEXT].reshape(WAYS, CONTEXT)
    past = model(rest, use_cache=True).past_key_values
    one = rest[:, :1]

    def decode() -> None:
        model(one, past_key_values=past, use_cache=True)
        past.crop(-1)

    return [
        Stage(f"prefill {PREFILL}", lambda: model(prompt, logits_to_keep=1), _states(model, prompt, blocks)),
        Stage(f"decode {WAYS}", decode, {b: s[:, -1:] for b, s in _states(model, rest, blocks).items()}),
    ]


def other_states(model: Any, tokenizer: Any, block: int) -> Tensor:
    """The states [T, D] of further passages at a block, for drawing detectors."""
    ids = _tokens(tokenizer)[PREFILL + WAYS * CONTEXT :][:OTHERS]
    return torch.cat([_states(model, part[None], [block])[block][0] for part in ids.split(PREFILL)])


def _tokens(tokenizer: Any) -> Tensor:
    return tokenizer("\n".join(corpus().passages), return_tensors="pt").input_ids[0]


def _states(model: Any, ids: Tensor, blocks: Iterable[int]) -> dict[int, Tensor]:
    hidden = model(ids, output_hidden_states=True).hidden_states
    return {block: hidden[block + 1].clone() for block in blocks}


def drawn(states: Tensor, signatures: int, seed: int = 0) -> SiteTensors:
    """A site of `signatures` random signatures of rank 2, drawn for these states [T, D], all in capsule set 0."""
    g, dim, slots = torch.Generator().manual_seed(seed), states.shape[-1], max(1, signatures)
    site = SiteTensors.empty(width=dim, signatures=slots, rank=RANK, rows=1, set_length=slots)
    if not signatures:
        return site
    detector, bias = detectors(states, signatures, g)
    site.detector.copy_(detector)
    site.bias.copy_(bias)
    site.basis.copy_(torch.linalg.qr(torch.randn(signatures, dim, RANK, generator=g)).Q.mT)
    site.strength.fill_(1.0)
    site.owner.copy_(torch.arange(signatures))
    site.used.fill_(signatures)
    site.write_set(0, range(signatures))
    for slots_of in torch.arange(signatures).split(1024):
        site.write_screen(slots_of)
    return site


def detectors(states: Tensor, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Detectors [count, D] and biases [count], random where the covariance of states [T, D] is 1, HEIGHT over it."""
    dim = states.shape[-1]
    v = torch.nn.functional.normalize(states, dim=-1) * dim**0.5
    covariance = torch.cov(v.t())
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(dim)
    values, vectors = torch.linalg.eigh(covariance)
    detector = torch.randn(count, dim, generator=rng) * values.rsqrt() @ vectors.t()
    spread = ((detector @ covariance) * detector).sum(-1).sqrt()
    return detector, -(detector @ v.mean(0) + HEIGHT * spread)


def dense(x: Tensor, site: SiteTensors) -> Tensor:
    """The formula as it stands, for all slots at once: x [B, T, D] -> a copy of it, suppressed."""
    flat = x.reshape(-1, x.shape[-1])
    v = flat * (flat.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    gate = (torch.addmm(site.bias, v, site.detector.t()) > 0) * site.strength
    basis = site.basis.reshape(-1, flat.shape[-1])
    coefficient = (flat @ basis.t()).unflatten(-1, site.target.shape) - site.target
    return (flat - (coefficient * gate.unsqueeze(-1)).flatten(1) @ basis).reshape(x.shape)


def add(x: Tensor, site: SiteTensors) -> None:
    """What steering vectors do: one direction added to every token, in place."""
    x.add_(site.basis[0, 0], alpha=1e-9)


def copy(x: Tensor, site: SiteTensors) -> Tensor:
    """What a hook costs that gives back another tensor, whatever it computes."""
    return x.clone()


PEERS: Mapping[str, Peer] = {"dense": dense, "add": add, "copy": copy}


def growth(record: Record, model: Any, tokenizer: Any, sizes: Iterable[int], peers: Iterable[str], rounds: int) -> None:
    """Into the table `growth`: for each stage and number of signatures what KIF and the peers cost at one site."""
    block = len(decoder_blocks(model)) // 10
    with torch.inference_mode():
        measured = stages(model, tokenizer, [block])
        states = other_states(model, tokenizer, block)
        for size in sizes:
            site = drawn(states, size)
            for stage in measured:
                shape = {"stage": stage.name, "signatures": size}
                done = {row["what"] for row in record.rows("growth", **shape)}
                calls = _contenders(stage.states[block], site, peers)
                contenders = {what: call for what, call in calls if what not in done}
                found = interleaved(stage.forward, contenders, rounds) if contenders else {}
                record.add("growth", [{**shape, "what": what} | costs for what, costs in found.items()])


def _contenders(x: Tensor, site: SiteTensors, peers: Iterable[str]) -> Iterable[tuple[str, Call]]:
    rows = torch.zeros(len(x), dtype=torch.int32)
    scratch = x.clone()  # suppression writes it; a token suppressed before fires as before
    yield "kif", partial(suppress_, scratch, rows, site)
    for name in peers:
        yield name, partial(PEERS[name], x.clone(), site)


def mined(record: Record, model: Any, tokenizer: Any, capsules: list[Capsule], rounds: int) -> None:
    """Into the table `mined`: the same for capsules as they were mined, all at once, over all their sites."""
    bank = CapsuleBank.for_capsules(capsules, width=width(model))
    row = bank.row(c.id for c in capsules)
    held = {"capsules": len(capsules), "signatures": sum(len(c.signatures) for c in capsules)}
    record.results.pop("mined", None)  # perhaps of other capsules
    with torch.inference_mode():
        for stage in stages(model, tokenizer, bank.sites):
            states = {block: x.clone() for block, x in stage.states.items()}

            def all_sites(states: dict[int, Tensor] = states) -> None:
                for block, x in states.items():
                    suppress_(x, torch.full((len(x),), row, dtype=torch.int32), bank.site(block))

            found = interleaved(stage.forward, {"kif": all_sites}, rounds)["kif"]
            record.add("mined", [{"stage": stage.name} | held | found])


def plots(results: Mapping[str, Any]) -> dict[str, str]:
    """The growth curves, both axes logarithmic; the dashed line is the most that it may cost."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(results["growth"], key=lambda row: row["signatures"]):
        series.setdefault(f"{row['what']}, {row['stage']}", []).append((row["signatures"], row["share"]))
    return {"growth": curves("Cost at one site", "signatures", "share of the model's forward", series, limit=0.05)}
