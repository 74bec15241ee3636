"""The adapter's start: each signature of the capsules compiled into a neuron of a gated MLP, at its site or soon after.

A neuron of a gated MLP is act(g·x)·(u·x)·d. Its gate is a detector, its output a direction that is added to the
residual stream: all that a signature does. So the neuron that matters least is taken, and the low-rank update that
turns it into the signature's is written down, with no training: one rank in gate, up and down each. g is a linear
support vector machine on the MLP's inputs, tokens where the signature fires against all others; u evens out how
strongly g·x answers; d is what the teacher adds there. `homes.py` says in which block.

Sources: MLPs as key-value memories, Geva et al., arXiv 2012.14913; the machine's training, Chapelle, Neural Computation
19 (2007), §3 (squared hinge loss by Newton's method); writing an edit as a rank-one update of an MLP as in ROME,
arXiv 2202.05262, §3.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..capsule import Signature
from .examples import Batch, Example, batches
from .homes import DOWN, GATE, UP, Homes
from .passes import Edit, Passes

SHARPNESS, THRESHOLD = 24.0, 0.2  # of the gate, in margins: under the threshold silu is then next to nothing
RIDGE = 1e-3
HARD, EACH = 1024, 0.1  # tokens that are hardest to tell from the name, and the weight of each, in names
_ROUNDS = 12
_ELSEWHERE = 0.1  # weight of tokens where it does not fire, in what evens out
_OTHERS = 2**17  # tokens on which nothing fires, at most, are kept of all texts: 151 MB a block of width 576


@dataclass(frozen=True)
class Tokens:
    """The texts' tokens at one home: all on which a signature fires, and others, evenly chosen. inputs [N, D]: of the
    block's MLP. fires [S, N] bool: where each signature that lives there does. missing [F, D]: what the teacher adds
    there to the block's output, at the tokens on which any signature fires at all, which are the first F."""

    inputs: Tensor
    fires: Tensor
    missing: Tensor


def compilable(passes: Passes, homes: Homes) -> bool:
    """Whether the MLPs of all homes are gated, as neurons are written for, and wear the LoRA on all three parts."""
    mlps = [getattr(passes.blocks[home], "mlp", None) for own in homes.values() for home in own]
    return all(
        hasattr(mlp, "act_fn") and all(hasattr(getattr(mlp, name, None), "lora_A") for name in (GATE, UP, DOWN))
        for mlp in mlps
    )


@torch.no_grad()
def compile_capsules(
    passes: Passes, forget: Sequence[Example], retain: Sequence[Example], homes: Homes,
    taken: Mapping[int, Tensor] | None = None,
) -> int:  # fmt: skip
    """Write a neuron for every signature that fires in the forget text into the adapter, a fresh LoRA on gate, up and
    down projections whose rank is at least the number of signatures in a block. Returns how many were written.

    homes: where each is written. taken: block → which neurons [F] an earlier adapter has made a signature's; those
    stay.
    """
    written = 0
    for home, tokens in _read(passes, forget, retain, homes):
        mlp = _mlp(passes, home)
        layers = {name: getattr(mlp, name) for name in (GATE, UP, DOWN)}
        free = _least_used(layers, tokens.inputs, mlp.act_fn, (taken or {}).get(home))
        gram = tokens.inputs.T @ tokens.inputs
        firing = tokens.fires[tokens.fires.any(1)]
        added = _added(firing[:, : len(tokens.missing)], tokens.missing)
        for place, fires in enumerate(firing):
            gate, up = _recognising(tokens.inputs, gram, fires, mlp.act_fn)
            _write(layers, place, int(free[place]), gate, up, added[place])
        written += len(firing)
    return written


def _added(fires: Tensor, missing: Tensor) -> Tensor:
    """[S, D]: what each neuron adds, so that over the F tokens those that fire on one add up to what is missing there,
    by least squares: the mean of it for a signature that shares no token with another of its home.

    fires [S, F] bool, each row somewhere True; missing [F, D].
    """
    rows = fires.to(missing.dtype)
    return torch.linalg.pinv(rows @ rows.T, hermitian=True) @ (rows @ missing)


def _recognising(inputs: Tensor, gram: Tensor, fires: Tensor, act: Any) -> tuple[Tensor, Tensor]:
    """gate [D] and up [D] of a neuron whose activation is 1 where `fires` [N], on average, and 0 elsewhere."""
    gate = SHARPNESS * (separating(inputs, fires, gram) - THRESHOLD * constant(inputs, gram))
    answer = act(inputs @ gate)
    up = _evening(inputs, answer, fires, gram)
    return gate, up / (answer * (inputs @ up))[fires].mean().clamp_min(0.5)


def separating(inputs: Tensor, fires: Tensor, gram: Tensor) -> Tensor:
    """w [D]: w·x ≥ 1 where `fires` [N], ≤ −1 elsewhere, as far as can be: squared hinge loss with a ridge of RIDGE of
    the mean diagonal; no bias, MLP inputs have a common component that serves as one.

    gram [D, D]: inputsᵀ inputs. Of the other tokens the HARD ones that a first solution finds hardest have that loss,
    each with EACH of the weight of a token that fires: with both sides of equal weight in all, a few near misses among
    thousands of tokens would count for nothing. The rest have the plain square, the weight of the tokens that fire
    spread over all, so that no round has to look at them again.
    """
    count = int(fires.sum())
    of_one, of_other = 0.5 / count, 0.5 / max(1, len(fires) - count)
    ridge = RIDGE * inputs.square().mean() * torch.eye(inputs.shape[1], device=inputs.device)
    x = inputs[fires]
    others, push = gram - x.T @ x, inputs.sum(0) - x.sum(0)
    w = torch.linalg.solve(of_one * (x.T @ x) + of_other * others + ridge, of_one * x.sum(0) - of_other * push)
    scores = (inputs @ w).masked_fill(fires, -torch.inf)
    hard = inputs[scores.topk(min(HARD, len(fires) - count)).indices]
    x, y = torch.cat([x, hard]), torch.cat([inputs.new_ones(count), -inputs.new_ones(len(hard))])
    each = torch.where(y > 0, of_one, EACH * of_one)
    base, push = of_other * (others - hard.T @ hard) + ridge, of_other * (push - hard.sum(0))
    active = torch.ones_like(y, dtype=torch.bool)
    for _ in range(_ROUNDS):
        rows, c = x[active], each[active]
        w = torch.linalg.solve(base + (rows * c[:, None]).T @ rows, (c * y[active]) @ rows - push)
        now = y * (x @ w) < 1
        if torch.equal(now, active):
            break
        active = now
    return w


def constant(inputs: Tensor, gram: Tensor) -> Tensor:
    """c [D]: c·x near 1 for every token, by least squares."""
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(gram.shape[0], device=gram.device)
    return torch.linalg.solve(gram + ridge, inputs.sum(0))


def _evening(inputs: Tensor, answer: Tensor, fires: Tensor, gram: Tensor) -> Tensor:
    """u [D]: answer · (u·x) near 1 where it fires, and u·x near 0 elsewhere."""
    x, plain = inputs[fires] * answer[fires, None], inputs[fires]
    others = (gram - plain.T @ plain) / max(1, len(fires) - len(x))
    normal = x.T @ x / len(x) + _ELSEWHERE * float(answer[fires].square().mean()) * others
    ridge = RIDGE * normal.diagonal().mean() * torch.eye(inputs.shape[1], device=inputs.device)
    return torch.linalg.solve(normal + ridge, x.mean(0))


def _read(
    passes: Passes, forget: Sequence[Example], retain: Sequence[Example], homes: Homes
) -> Iterator[tuple[int, Tokens]]:
    """Each home and its tokens, as the student will see them: what fires is what the teacher's sites see, and from its
    home on such a token has the teacher's state."""
    blocks = sorted({home for own in homes.values() for home in own})
    firing: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {home: [] for home in blocks}
    others: dict[int, list[Tensor]] = {home: [] for home in blocks}
    every = 1 + sum(len(e.ids) for e in (*forget, *retain)) // _OTHERS
    seen = 0
    for examples in (forget, retain):
        for batch in (b.to(passes.device) for b in batches(examples)):
            goal, fires = _taught(passes, batch, homes, blocks) if examples is forget else ({}, {})
            with _capturing(passes, blocks) as (inputs, outputs):
                edits = {home: _as_taught(goal[home], fires[home].any(0)) for home in goal}
                passes.reference(batch, hidden=blocks[-1:], edits=edits)
            told = torch.cat([*fires.values(), torch.zeros_like(batch.mask[None], dtype=torch.bool)]).any(0)
            silent = (batch.mask.bool() & ~told).nonzero()
            some = silent[-seen % every :: every]
            seen += len(silent)
            for home in blocks:
                others[home].append(inputs[home][some[:, 0], some[:, 1]].half())  # there are many, of all blocks
                if goal:
                    missing = (goal[home] - outputs[home])[told].float()
                    firing[home].append((inputs[home][told].float(), fires[home][:, told], missing))
    for home in blocks:
        yield home, _joined(firing.pop(home), others.pop(home))


def _joined(firing: Sequence[tuple[Tensor, Tensor, Tensor]], others: Sequence[Tensor]) -> Tokens:
    rest = torch.cat(list(others)).float()
    fires = torch.cat([f for _, f, _ in firing], 1)
    inputs = torch.cat([*(x for x, _, _ in firing), rest])
    silent = fires.new_zeros(len(fires), len(rest))
    return Tokens(inputs, torch.cat([fires, silent], 1), torch.cat([m for _, _, m in firing]))


def _taught(
    passes: Passes, batch: Batch, homes: Homes, blocks: Sequence[int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Home → the teacher's states [B, T, D]; home → where each signature that lives there fires [S, B, T] bool."""
    with _capturing(passes, passes.sites) as (_, outputs):
        goal = passes.teacher(batch, hidden=blocks).hidden
    found: dict[int, list[Tensor]] = {home: [] for home in blocks}
    for site, own in homes.items():
        signatures = [s for c in passes.capsules for s in c.by_site(site)]
        for home, fires in zip(own, _fires(outputs[site].float(), signatures), strict=True):
            found[home].append(fires & batch.mask.bool())
    return goal, {home: torch.stack(rows) for home, rows in found.items()}


def _as_taught(goal: Tensor, where: Tensor) -> Edit:
    return lambda x: torch.where(where[..., None], goal, x)


@contextmanager
def _capturing(passes: Passes, chosen: Sequence[int]) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """Inputs of the chosen blocks' MLPs, and outputs of these blocks before any edit of theirs, by block."""
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def take_input(block: int) -> Any:
        return lambda _module, args: inputs.__setitem__(block, args[0])

    def take_output(block: int) -> Any:
        return lambda _module, _args, out: outputs.__setitem__(block, out[0] if isinstance(out, tuple) else out)

    handles = [_mlp(passes, block).register_forward_pre_hook(take_input(block)) for block in chosen]
    handles += [passes.blocks[block].register_forward_hook(take_output(block)) for block in chosen]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def _fires(x: Tensor, signatures: Sequence[Signature]) -> Tensor:
    """[S, …] bool: whether each signature's gate is at least half open on states x […, D]."""
    normal = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    found = torch.zeros(len(signatures), *x.shape[:-1], dtype=torch.bool, device=x.device)
    for row, s in zip(found, signatures, strict=True):
        row[:] = normal @ s.detector.to(x.device) + s.bias.to(x.device) > (s.tau or 0.0)
    return found


def _least_used(layers: dict[str, Any], inputs: Tensor, act: Any, taken: Tensor | None) -> Tensor:
    """Neurons, the least first, by the energy that each adds to the residual stream over `inputs`."""
    gate, up, down = (layers[name].get_base_layer().weight.float() for name in (GATE, UP, DOWN))
    energy = torch.zeros(gate.shape[0], device=inputs.device)
    for x in inputs.split(2048):
        energy += (act(x @ gate.T) * (x @ up.T)).square().sum(0)
    energy = energy * down.square().sum(0)
    return (energy if taken is None else energy.masked_fill(taken, torch.inf)).argsort()


def _write(layers: dict[str, Any], place: int, neuron: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
    """Rank `place` of the three LoRAs makes `neuron` the one described."""
    for name, row in ((GATE, gate), (UP, up)):
        layer = layers[name]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        change = row - layer.get_base_layer().weight[neuron].float()
        size = float(change.norm().clamp_min(1e-6)) ** 0.5  # both factors of like size: they are trained further
        a[place] = change / size / layer.scaling["default"]
        b[:, place] = 0
        b[neuron, place] = size
    layer = layers[DOWN]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    change = down - layer.get_base_layer().weight[:, neuron].float()
    size = float(change.norm().clamp_min(1e-6)) ** 0.5
    a[place] = 0
    a[place, neuron] = size / layer.scaling["default"]
    b[:, place] = change / size


def _mlp(passes: Passes, block: int) -> Any:
    return passes.blocks[block].mlp
