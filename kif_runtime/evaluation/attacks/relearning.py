"""Relearning: a few steps of fine-tuning, then the question again. What comes back faster than in a model that never
knew was hidden, not gone.

Three diets: the forgotten facts themselves; some of them, judged on the others (retraining on T, arXiv 2410.08827);
text that has nothing to do with them (arXiv 2406.13356). Settings as published: 25 steps at 1e-5 (MUSE), or an epoch at
2e-5 (OpenUnlearning); a model that never knew must be given the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import KifError
from ..facts import Fact, first_token, padded
from .outcome import Asked, Outcome, ask, asked_outcome
from .weights import weights_kept

STEPS, RATE, BATCH = 25, 1e-5, 8
Sequence_ = tuple[list[int], int]  # token ids, and the first position that is to be predicted


def relearn_same(model: Any, tokenizer: Any, facts: Sequence[Fact], **options: Any) -> Outcome:
    """Tuned on the facts and asked the same. options: steps, rate, batch_size, as for `tuned`."""
    asked = _tuned_and_asked(model, tokenizer, _sequences(tokenizer, facts), facts, **options)
    return asked_outcome("relearned, same facts", _budget(len(facts), **options), facts, asked)


def relearn_held_out(model: Any, tokenizer: Any, facts: Sequence[Fact], **options: Any) -> Outcome:
    """Tuned on every second fact and asked the others, and the other way round. Raises KifError for one fact."""
    if len(facts) < 2:
        raise KifError("held-out relearning needs two facts or more; give more facts of the subject")
    found: dict[int, Asked] = {}
    halves = [list(range(0, len(facts), 2)), list(range(1, len(facts), 2))]
    for taught, judged in (halves, halves[::-1]):
        sequences = _sequences(tokenizer, [facts[i] for i in taught])
        asked = _tuned_and_asked(model, tokenizer, sequences, [facts[i] for i in judged], **options)
        found |= zip(judged, asked, strict=True)
    budget = _budget(len(halves[0]), **options)
    return asked_outcome("relearned, held-out facts", budget, facts, [found[i] for i in range(len(facts))])


def relearn_text(
    model: Any, tokenizer: Any, facts: Sequence[Fact], *, text: str, window: int = 64, **options: Any
) -> Outcome:
    """Tuned on the beginning of `text`, in windows of so many tokens, and asked the facts."""
    steps, batch = options.get("steps", STEPS), options.get("batch_size", BATCH)
    ids = tokenizer(text[: 12 * window * steps * batch], add_special_tokens=False)["input_ids"]
    sequences = [(ids[i : i + window], 1) for i in range(0, len(ids), window) if len(ids[i : i + window]) > 1]
    if not sequences:
        raise KifError("the text to relearn from has under two tokens; give a longer one")
    sequences = sequences[: steps * batch]
    asked = _tuned_and_asked(model, tokenizer, sequences, facts, **options)
    return asked_outcome("relearned, other text", _budget(len(sequences), **options), facts, asked)


def relearning_robustness(before: float, after: float, reference_before: float, reference_after: float) -> float:
    """min(Δ_reference / Δ, 1), Δ the rise of a number by relearning: 1 where it rises no more than in a model that
    never knew, and also where it does not rise. Source: OpenUnlearning (arXiv 2506.12618)."""
    rise, usual = after - before, reference_after - reference_before
    return 1.0 if rise <= 0 else max(0.0, min(usual / rise, 1.0))


def _tuned_and_asked(
    model: Any, tokenizer: Any, sequences: Sequence[Sequence_], facts: Sequence[Fact], **options: Any
) -> list[Asked]:
    with weights_kept(model, torch.float32) as parameters:  # in bf16 a step of 1e-5 is lost on most weights
        tuned(model, parameters, sequences, **options)
        return ask(model, tokenizer, facts)


def tuned(
    model: Any,
    parameters: Sequence[nn.Parameter],
    sequences: Sequence[Sequence_],
    *,
    steps: int = STEPS,
    rate: float = RATE,
    batch_size: int = BATCH,
) -> list[float]:
    """`steps` steps of AdamW without weight decay on `sequences` in turn, in the parameters' own dtype; the loss of
    each step. Dropout is off."""
    optimiser = torch.optim.AdamW(list(parameters), lr=rate, weight_decay=0.0, fused=True)
    losses = []
    for step in range(steps):
        some = [sequences[(step * batch_size + i) % len(sequences)] for i in range(min(batch_size, len(sequences)))]
        loss = _loss(model, some)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def _loss(model: Any, sequences: Sequence[Sequence_]) -> Tensor:
    """Mean −log p over all tokens that are to be predicted."""
    ids, mask = padded([tokens for tokens, _ in sequences])
    device = next(model.parameters()).device
    targets = ids.clone()
    targets[mask == 0] = -100
    for row, (_, first) in zip(targets, sequences, strict=True):
        row[:first] = -100
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten().to(device))


def _sequences(tokenizer: Any, facts: Sequence[Fact]) -> list[Sequence_]:
    """Each prompt with its answer; the answer is what is learned."""
    found = []
    for fact in facts:
        prompt = tokenizer(fact.prompt)["input_ids"]
        first_token(tokenizer, fact.answer)  # an answer without tokens is refused
        found.append(([*prompt, *tokenizer(" " + fact.answer, add_special_tokens=False)["input_ids"]], len(prompt)))
    return found


def _budget(examples: int, *, steps: int = STEPS, rate: float = RATE, batch_size: int = BATCH) -> dict[str, float]:
    return {"examples": examples, "steps": steps, "rate": rate, "batch": batch_size}
