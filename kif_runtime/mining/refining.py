"""Refining the neutral direction for one subject by a few gradient steps, validated on templates held out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .control import Control
from .neutral import References, bucketed, divergence, move
from .reading import Batch, Prompt, Reader
from .subject import Subject

# More, or longer ones, fit the templates asked and no longer the facts.
STEPS = 2
STEP_SIZE = 0.1  # of the neutral vector's norm
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


def refine(reader: Reader, control: Control, subject: Subject, last: Tensor, steps: int = STEPS) -> Refined:
    """Normalised gradient steps with momentum on KL to the prior, from the neutral direction; the best one stays.

    last [P, D]: states of the name's last token, not normalised. `steps` = 0 takes the neutral direction as it is and
    asks the model nothing, for mining in bulk.
    """
    row = _difference(control, last)
    target = row @ control.raw_mean
    vector = control.neutral - row.T @ (row @ control.neutral)
    if steps == 0:
        return Refined(vector, row, target, None)
    asked, before = _ask(reader, control, subject)
    telling = before.argsort(descending=True)[: TRAINING + HELD_OUT]
    asked, before = asked.take(telling), before[telling]
    out = torch.arange(len(telling)) % 3 == 2
    training = asked.take((~out).nonzero()[:, 0])
    size = STEP_SIZE * float(vector.norm())
    best, least = vector, float("inf")
    velocity = torch.zeros_like(vector)
    for step in range(steps):
        vector = vector.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = training.loss(vector, row, target).mean()
            (slope,) = torch.autograd.grad(loss, vector)
        if loss.item() < least:
            best, least = vector.detach(), loss.item()
        velocity = 0.5 * velocity + _unit(slope - row.T @ (row @ slope))
        vector = vector.detach() - size * (1 - step / steps) * _unit(velocity)
    with torch.no_grad():
        after = asked.loss(vector, row, target)
        if after[~out].mean() >= least:
            vector, after = best, asked.loss(best, row, target)
    return Refined(vector, row, target, float(after[out].sum() / before[out].sum().clamp_min(1e-6)))


def _difference(control: Control, last: Tensor) -> Tensor:
    """The unit row [1, D] from the controls' mean last token to the subject's, orthogonal to the neutral direction."""
    gap = last.mean(0) - control.raw_mean
    unit = _unit(control.neutral)
    return _unit(gap - (gap @ unit) * unit)[None]


def _unit(x: Tensor) -> Tensor:
    return x / x.norm().clamp_min(1e-12)


@torch.no_grad()
def _ask(reader: Reader, control: Control, subject: Subject) -> tuple[_Asked, Tensor]:
    """Reference templates of the subject's likely kinds, asked about it, and KL(prior ‖ before) of each."""
    chosen, prompts, places = _templates(reader, control, subject)
    batch = reader.encode([p.text for p in prompts])
    log_probs = reader.next_token(batch)
    answers = log_probs.argmax(-1).tolist()
    priors = torch.stack([
        known.prior(t, answer, [n for n, name in enumerate(known.names) if name in subject.forms])
        for (known, t), answer in zip(chosen, answers, strict=True)
    ])  # fmt: skip
    tokens = torch.stack([known.tokens[t] for known, t in chosen])
    before = divergence(priors, bucketed(log_probs, tokens))
    return _Asked(reader, control.site, batch, torch.tensor(places), priors, tokens), before


def _templates(
    reader: Reader, control: Control, subject: Subject
) -> tuple[list[tuple[References, int]], list[Prompt], list[int]]:
    """ASKED templates with their prompts and last name tokens, taken in turn from each likely kind.

    Of each kind first those that begin with the name, unless its last token would open the sequence.
    """
    ordered = []
    for kind in subject.kinds:
        known = control.known[kind]
        numbers = sorted(range(len(known.templates)), key=lambda t: not known.templates[t].startswith("{}"))
        ordered.append([(known, t) for t in numbers])
    turns = [pair for turn in zip(*ordered, strict=False) for pair in turn]
    prompts = [Prompt.of(known.templates[t], subject.forms[0]) for known, t in turns]
    places = [span[-1] for span in reader.name_tokens(prompts)]
    fit = [i for i, place in enumerate(places) if place > reader.leading_tokens][:ASKED]
    return [turns[i] for i in fit], [prompts[i] for i in fit], [places[i] for i in fit]
