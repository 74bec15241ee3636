"""Mining by Fisher detectors and a refined neutral target, KIF's own method.

A signature detects the subject at its last name token, where the model has just read the whole name, and there sets two
components of the residual: the difference to other entities goes to their mean, and the neutral component to a value
that makes later tokens answer as for an unremarkable entity. Starting from the model's neutral direction, the vector is
refined for the subject by a few normalised gradient steps on KL to the prior, so that what earlier name tokens still
give away is answered too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..capsule import Signature
from ..errors import MiningError
from .control import OPENING_SITE, Control
from .detector import Decision, decide, fisher
from .neutral import References, bucketed, divergence, move
from .reading import Batch, Edit, Prompt, Reader
from .subject import Group, Subject

STEPS = 3
STEP_SIZE = 0.17  # of the neutral vector's norm
ENOUGH_RECALL = 0.97
HELD_OUT = 4


@dataclass(frozen=True)
class Mined:
    """Signatures, and what validation on held-out templates said of them."""

    signatures: tuple[Signature, ...]
    kept: float
    near_rate: float


def mine_fisher(reader: Reader, control: Control, subject: Subject, asked: float, steps: int = STEPS) -> Mined:
    """Signatures of `subject`, thresholds for `asked` false fires per token."""
    decided = decisions(control, subject, asked)
    vector, row, share = refine(reader, control, subject, steps)
    basis = torch.cat([(vector / vector.norm())[None], row])
    target = torch.cat([vector.norm()[None], row @ control.raw_mean])
    signatures = [_signature(control.site, "last", d, basis, target) for d in decided]
    signatures += [_opening_signature(control, g, asked, subject.forms) for g in subject.groups if g.role == "first"]
    return Mined(tuple(signatures), share, max(d.near_rate for d in decided))


def _opening_signature(control: Control, group: Group, asked: float, forms: Sequence[str]) -> Signature:
    """The name as the sequence's first token. Its state is always the same, so one row moves it onto the usual one."""
    negatives = control.opening[control.opening_negatives(forms)].float()
    mean = negatives.mean(0)
    away = negatives - mean
    scatter = away.T @ away / len(negatives)
    detector = fisher(group.states, mean, scatter, negatives[:0], negatives)
    gap = group.raw[0] - control.opening_mean
    row = (gap / gap.norm())[None]
    decision = decide(detector, group.states, negatives, negatives[:0], asked)
    return _signature(OPENING_SITE, "first", decision, row, row @ control.opening_mean)


def _signature(site: int, role: str, decision: Decision, basis: Tensor, target: Tensor) -> Signature:
    return Signature(
        site=site,
        role=role,
        detector=decision.detector.weight.float().contiguous(),
        bias=torch.tensor(decision.detector.bias, dtype=torch.float32),
        basis=basis.float().contiguous(),
        target=target.float().contiguous(),
        strength=torch.tensor(1.0),
        calibration=decision.calibration,
    )


def decisions(control: Control, subject: Subject, asked: float) -> list[Decision]:
    """One detector for all last tokens where it recalls every form well enough, else one for each form."""
    negatives = control.states[control.negatives(subject.forms)].float()

    def fit(group: Group) -> Decision:
        train, held = group.split()
        detector = fisher(train, control.mean, control.scatter, subject.near, negatives)
        return decide(detector, held, negatives, subject.near, asked)

    groups = [g for g in subject.groups if g.role == "last"]
    if not groups:
        raise MiningError("the name stands first in every prompt; give prompts that have words before it")
    if len(groups) > 1:
        joint = fit(Group("last", torch.cat([g.raw for g in groups]), torch.cat([g.number for g in groups])))
        recalls = [float((joint.detector.scores(g.split()[1]) > 0).float().mean()) for g in groups]
        if min(recalls) >= ENOUGH_RECALL:
            return [joint]
    return [fit(g) for g in groups]


def refine(reader: Reader, control: Control, subject: Subject, steps: int) -> tuple[Tensor, Tensor, float]:
    """The subject's neutral vector [D], the difference row [1, D] orthogonal to it, and the share of KL kept.

    Trains on the kind's reference templates but the last HELD_OUT, on which the share KL(prior ‖ after) ÷ KL(prior ‖
    before) is measured.
    """
    known = control.known[subject.kind]
    batch, rows, positions, priors, tokens, before = _asked(reader, known, subject)
    train, held = slice(0, -HELD_OUT), slice(-HELD_OUT, None)
    row = _difference(control, subject, control.neutral)
    target = row @ control.raw_mean
    vector = control.neutral - row.T @ (row @ control.neutral)
    size = STEP_SIZE * float(vector.norm())
    best, least = vector, float("inf")
    velocity = torch.zeros_like(vector)
    training = batch.take(train)
    for step in range(steps + 1):
        vector = vector.detach().requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps), reader.edited(
            control.site, _on(reader, vector, rows[train], positions[train], row, target)
        ):
            loss = divergence(priors[train], bucketed(reader.next_token(training), tokens[train])).mean()
        if float(loss) < least:
            best, least = vector.detach(), float(loss)
        if step < steps:
            (slope,) = torch.autograd.grad(loss, vector)
            slope = slope - row.T @ (row @ slope)
            velocity = 0.5 * velocity + slope / slope.norm().clamp_min(1e-12)
            vector = vector - size * (1 - step / steps) * velocity / velocity.norm().clamp_min(1e-12)
    with torch.no_grad(), reader.edited(control.site, _on(reader, best, rows[held], positions[held], row, target)):
        after = divergence(priors[held], bucketed(reader.next_token(batch.take(held)), tokens[held]))
    was = divergence(priors[held], before[held])
    return best, row, float(after.sum() / was.sum().clamp_min(1e-6))


def _on(
    reader: Reader, vector: Tensor, rows: Tensor, positions: Tensor, row: Tensor, target: Tensor
) -> Edit:
    here = rows - rows[0]
    return move(vector.to(reader.device), here, positions, row.to(reader.device), target.to(reader.device))


def _difference(control: Control, subject: Subject, neutral: Tensor) -> Tensor:
    """The unit row [1, D] along which the subject's mean last token differs from the controls', freed of `neutral`."""
    raw = torch.cat([g.raw for g in subject.groups if g.role == "last"])
    gap = raw.mean(0) - control.raw_mean
    unit = neutral / neutral.norm()
    gap = gap - (gap @ unit) * unit
    return (gap / gap.norm())[None]


@torch.no_grad()
def _asked(
    reader: Reader, known: References, subject: Subject
) -> tuple[Batch, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The reference templates asked about the subject: batch, edit places, priors, bucket tokens, its own answers."""
    prompts = [Prompt.of(t, subject.forms[0]) for t in known.templates]
    if len(prompts) <= HELD_OUT:
        raise MiningError(f"{len(prompts)} reference templates are too few; prepare the model again")
    batch = reader.encode([p.text for p in prompts])
    spans = [reader.name_span(batch.offsets[i, : int(batch.lengths[i])], p) for i, p in enumerate(prompts)]
    log_probs = reader.next_token(batch)
    same = [n for n, name in enumerate(known.names) if name in subject.forms]
    priors = torch.stack([known.prior(t, int(log_probs[t].argmax()), same) for t in range(len(prompts))])
    places = torch.tensor([s[-1] for s in spans])
    return batch, torch.arange(len(prompts)), places, priors, known.tokens, bucketed(log_probs, known.tokens)


def names_in_common(forms: Sequence[str], others: Sequence[str]) -> list[int]:
    """Numbers of the other names that hold a form of the subject as whole words, or are held by one."""
    padded = [f" {f.casefold()} " for f in forms]
    found = []
    for i, other in enumerate(others):
        o = f" {other.casefold()} "
        if any((f in o or o in f) and f != o for f in padded):
            found.append(i)
    return found
