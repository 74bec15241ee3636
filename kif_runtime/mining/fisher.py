"""Mining by Fisher detectors and a refined neutral target, KIF's own method.

The main signature detects the subject at its last name token, where the model has just read the whole name, and there
sets two components of the residual: the difference to other entities goes to their mean, and the neutral component to a
value that makes later tokens answer as for an unremarkable entity. Starting from the model's neutral direction, the
vector is refined for the subject by a few normalised gradient steps on KL to the prior. Others stand beside it: for the
tokens between a name's first and last (`early`), and for a name whose only token opens the sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..capsule import Signature
from ..errors import MiningError
from .control import Control
from .detector import Decision, decide, fisher, rank_one, signature
from .early import early_signatures
from .reading import Reader
from .refining import STEPS, refine
from .subject import Group, Subject, last_groups, opening_groups


@dataclass(frozen=True)
class Mined:
    """Signatures, and what validation on held-out templates said of them."""

    signatures: tuple[Signature, ...]
    kept: float | None
    near_rate: float


def mine_fisher(reader: Reader, control: Control, subject: Subject, asked: float, steps: int = STEPS) -> Mined:
    """Signatures of `subject`, thresholds for `asked` false fires per token."""
    early = early_signatures(reader, control, subject, asked)
    with reader.suppressing(early):  # the last token is recognised, and refined, as it is when the server runs
        groups = last_groups(reader, control, subject)
        decided = decisions(control, subject, groups, asked)
        refined = refine(reader, control, subject, torch.cat([g.raw for g in groups]), steps)
    last = [signature(control.site, "last", d, refined.basis, refined.targets) for d in decided]
    first = [_opening(control, g, asked, subject.forms) for g in opening_groups(reader, subject)]
    return Mined((*first, *early, *last), refined.kept, max(d.near_rate for d in decided))


def _opening(control: Control, group: Group, asked: float, forms: Sequence[str]) -> Signature:
    """The name as the sequence's first token. Its state is always the same, so one row moves it onto the usual one.

    It must not fire on the name elsewhere: what the other signatures see there would have been changed.
    """
    level = control.opening
    negatives = level.states[control.silent(level.text, forms)].float()
    detector = fisher(group.states, level.mean, level.scatter, group.aside, torch.cat([negatives, group.aside]))
    decision = decide(detector, group.states, negatives, group.aside, asked, up=0.75)  # the state is always the same
    return rank_one(level.site, "first", decision, group.raw[0], level.usual)


def decisions(control: Control, subject: Subject, groups: Sequence[Group], asked: float) -> list[Decision]:
    """A detector for each form's last token: one for all recalls less in sentences that no template is like."""
    negatives = control.states[control.silent(control.text, subject.forms)].float()

    def fit(group: Group) -> Decision:
        train, held = group.split()
        detector = fisher(train, control.mean, control.scatter, group.aside, negatives)
        return decide(detector, held, negatives, group.aside, asked)

    if not groups:
        raise MiningError("the name stands first in every prompt; give prompts that have words before it")
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
