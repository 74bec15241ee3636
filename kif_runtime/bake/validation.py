"""How far a baking has come, on held-out prompts: 0 is the goal of both ratios, and forget is 1 at the start.

`answers` compares next-token distributions and so speaks for any objective; `states` compares hidden states at one
block and costs only the blocks up to it.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .examples import Batch, Example, batches
from .passes import Output, Passes

Call = Callable[[Batch], Output]


@torch.no_grad()
def answers(passes: Passes, forget: Sequence[Example], retain: Sequence[Example]) -> dict[str, float]:
    """forget: Σ KL(teacher ‖ student) ÷ Σ KL(teacher ‖ reference) after the forget prompts. retain: mean
    KL(reference ‖ student) after the retain prompts, in units of the forget prompts' mean KL(teacher ‖ reference)."""

    def next_token(call: Call, examples: Sequence[Example]) -> Tensor:
        return torch.cat([_last(call(batch), batch) for batch in _batches(examples, passes)])

    def student(batch: Batch) -> Output:
        return passes.student(batch, logits=True)

    def reference(batch: Batch) -> Output:
        return passes.reference(batch, logits=True)

    goal = next_token(lambda batch: passes.teacher(batch, logits=True), forget)
    far = _divergence(goal, next_token(reference, forget)).mean().clamp_min(1e-6)
    left = _divergence(goal, next_token(student, forget)).mean()
    moved = _divergence(next_token(reference, retain), next_token(student, retain)).mean()
    return {"forget": float(left / far), "retain": float(moved / far)}


@torch.no_grad()
def states(passes: Passes, forget: Sequence[Example], retain: Sequence[Example], block: int) -> dict[str, float]:
    """The same two ratios of mean squared distances between RMS-normalised states at `block`, summed over tokens."""
    left, far, moved = [], [], []
    for batch in _batches(forget, passes):
        goal = passes.teacher(batch, hidden=[block])
        left.append(distances(passes.student(batch, hidden=[block]), goal, batch, block))
        far.append(distances(passes.reference(batch, hidden=[block]), goal, batch, block))
    for batch in _batches(retain, passes):
        own = passes.reference(batch, hidden=[block])
        moved.append(distances(passes.student(batch, hidden=[block]), own, batch, block))
    unit = torch.cat(far).mean().clamp_min(1e-6)
    return {"forget": float(torch.cat(left).mean() / unit), "retain": float(torch.cat(moved).mean() / unit)}


def distances(a: Output, b: Output, batch: Batch, block: int) -> Tensor:
    """[B]: squared distances at `block` between RMS-normalised states, summed over the tokens that are no padding."""
    away = (_normalised(a.hidden[block]) - _normalised(b.hidden[block])).square().mean(-1)
    return (away * batch.mask.to(away.device)).sum(1)


def _normalised(x: Tensor) -> Tensor:
    x = x.float()
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def _batches(examples: Sequence[Example], passes: Passes) -> Iterator[Batch]:
    return (batch.to(passes.device) for batch in batches(examples))


def _last(output: Output, batch: Batch) -> Tensor:
    """Log-probabilities [B, V] after each row's last token."""
    assert output.logits is not None
    ends = batch.mask.sum(1) - 1
    return output.logits[torch.arange(len(batch), device=ends.device), ends].float().log_softmax(-1).cpu()


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) [B] of log-probabilities, in nats."""
    return (p.exp() * (p - q)).sum(1)
