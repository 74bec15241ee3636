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
from .reading import Reader
from .refining import STEPS, refine
from .subject import Group, Subject

ENOUGH_RECALL = 0.97


@dataclass(frozen=True)
class Mined:
    """Signatures, and what validation on held-out templates said of them."""

    signatures: tuple[Signature, ...]
    kept: float | None
    near_rate: float


def mine_fisher(reader: Reader, control: Control, subject: Subject, asked: float, steps: int = STEPS) -> Mined:
    """Signatures of `subject`, thresholds for `asked` false fires per token."""
    negatives = control.states[control.negatives(subject.forms)].float()
    decided = decisions(control, subject, negatives, asked)
    refined = refine(reader, control, subject, steps)
    signatures = [_signature(control.site, "last", d, refined.basis, refined.targets) for d in decided]
    signatures += [_opening_signature(control, g, asked, subject.forms) for g in subject.groups if g.role == "first"]
    return Mined(tuple(signatures), refined.kept, max(d.near_rate for d in decided))


def _opening_signature(control: Control, group: Group, asked: float, forms: Sequence[str]) -> Signature:
    """The name as the sequence's first token. Its state is always the same, so one row moves it onto the usual one.

    It must not fire on the name elsewhere: what the other signature sees there would have been changed.
    """
    negatives = control.opening[control.opening_negatives(forms)].float()
    mean = negatives.mean(0)
    away = negatives - mean
    scatter = away.T @ away / len(negatives)
    aside = group.aside if group.aside is not None else negatives[:0]
    detector = fisher(group.states, mean, scatter, aside, torch.cat([negatives, aside]))
    gap = group.raw[0] - control.opening_mean
    row = (gap / gap.norm())[None]
    decision = decide(detector, group.states, negatives, aside, asked)
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


def decisions(control: Control, subject: Subject, negatives: Tensor, asked: float) -> list[Decision]:
    """One detector for all last tokens where it recalls every form well enough, else one for each form."""

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


def names_in_common(forms: Sequence[str], others: Sequence[str]) -> list[int]:
    """Numbers of the other names that hold a form of the subject as whole words, or are held by one."""
    padded = [f" {f.casefold()} " for f in forms]
    found = []
    for i, other in enumerate(others):
        o = f" {other.casefold()} "
        if any((f in o or o in f) and f != o for f in padded):
            found.append(i)
    return found
