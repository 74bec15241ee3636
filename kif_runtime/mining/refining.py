"""Refining the neutral direction for one subject by a few gradient steps, validated on templates held out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .control import Control
from .neutral import References, bucketed, divergence, move
from .reading import Batch, Prompt, Reader
from .subject import Subject

STEPS = 3
STEP_SIZE = 0.17  # of the neutral vector's norm
# Reference templates that are asked about the subject, first those that begin with the name: there its own first token
# cannot be suppressed, and most is kept.
ASKED = 10
# Of these, those that tell most about the subject: every third of them is held out.
TRAINING, HELD_OUT = 6, 3


@dataclass(frozen=True)
class Refined:
    """The subject's neutral vector [D], the difference row [1, D] orthogonal to it and its target [1].

    kept: KL(prior ‖ after) ÷ KL(prior ‖ before) on the held-out templates; None where no step was asked for.
    """

    vector: Tensor
    row: Tensor
    target: Tensor
    kept: float | None

    @property
    def basis(self) -> Tensor:
        return torch.cat([(self.vector / self.vector.norm())[None], self.row])

    @property
    def targets(self) -> Tensor:
        return torch.cat([self.vector.norm()[None], self.target])


@dataclass(frozen=True)
class _Asked:
    """Reference templates asked about the subject: its last name token in each, the priors over the bucket tokens."""

    reader: Reader
    site: int
    batch: Batch
    places: Tensor
    priors: Tensor
    tokens: Tensor

    def take(self, rows: Tensor) -> "_Asked":
        batch = self.batch.take(rows)
        return _Asked(self.reader, self.site, batch, self.places[rows], self.priors[rows], self.tokens[rows])

    def loss(self, vector: Tensor, row: Tensor, target: Tensor) -> Tensor:
        """KL(prior ‖ p) [B] with the vector set at the name."""
        device = self.reader.device
        rows = torch.arange(len(self.places))
        edit = move(vector.to(device), rows, self.places, row.to(device), target.to(device))
        with self.reader.edited(self.site, edit):
            return divergence(self.priors, bucketed(self.reader.next_token(self.batch), self.tokens))


def refine(reader: Reader, control: Control, subject: Subject, steps: int = STEPS) -> Refined:
    """Normalised gradient steps with momentum on KL to the prior, from the neutral direction; the best one stays.

    `steps` = 0 takes the neutral direction as it is and asks the model nothing, for mining in bulk.
    """
    row = _difference(control, subject)
    target = row @ control.raw_mean
    vector = control.neutral - row.T @ (row @ control.neutral)
    if steps == 0:
        return Refined(vector, row, target, None)
    asked, before = _ask(reader, control, subject)
    telling = before.argsort(descending=True)[: TRAINING + HELD_OUT]
    out = torch.arange(len(telling)) % 3 == 2
    training, held = asked.take(telling[~out]), asked.take(telling[out])
    size = STEP_SIZE * float(vector.norm())
    best, least = vector, float("inf")
    velocity = torch.zeros_like(vector)
    for step in range(steps):
        vector = vector.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = training.loss(vector, row, target).mean()
            (slope,) = torch.autograd.grad(loss, vector)
        if float(loss) < least:
            best, least = vector.detach(), float(loss)
        velocity = 0.5 * velocity + _unit(slope - row.T @ (row @ slope))
        vector = vector.detach() - size * (1 - step / steps) * _unit(velocity)
    with torch.no_grad():
        if float(training.loss(vector, row, target).mean()) < least:
            best = vector
        after = held.loss(best, row, target)
    return Refined(best, row, target, float(after.sum() / before[telling[out]].sum().clamp_min(1e-6)))


def _difference(control: Control, subject: Subject) -> Tensor:
    """The unit row [1, D] from the controls' mean last token to the subject's, orthogonal to the neutral direction."""
    gap = torch.cat([g.raw for g in subject.groups if g.role == "last"]).mean(0) - control.raw_mean
    unit = _unit(control.neutral)
    return _unit(gap - (gap @ unit) * unit)[None]


def _unit(x: Tensor) -> Tensor:
    return x / x.norm().clamp_min(1e-12)


@torch.no_grad()
def _ask(reader: Reader, control: Control, subject: Subject) -> tuple[_Asked, Tensor]:
    """The kind's reference templates for the subject, and KL(prior ‖ before) of each."""
    known: References = control.known[subject.kind]
    numbers = sorted(range(len(known.templates)), key=lambda t: not known.templates[t].startswith("{}"))[:ASKED]
    prompts = [Prompt.of(known.templates[t], subject.forms[0]) for t in numbers]
    batch = reader.encode([p.text for p in prompts])
    places = torch.tensor([s[-1] for s in reader.name_tokens(prompts)])
    log_probs = reader.next_token(batch)
    same: Sequence[int] = [n for n, name in enumerate(known.names) if name in subject.forms]
    answers = log_probs.argmax(-1).tolist()
    priors = torch.stack([known.prior(t, a, same) for t, a in zip(numbers, answers, strict=True)])
    tokens = known.tokens[numbers]
    before = divergence(priors, bucketed(log_probs, tokens))
    return _Asked(reader, control.site, batch, places, priors, tokens), before
