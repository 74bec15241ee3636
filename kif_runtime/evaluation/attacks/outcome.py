"""What an attack gained: per fact a hit or none, what it was allowed to spend, and the rate with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import KifError
from ..facts import BARE, BATCH, Fact, encode, first_token, last_logits
from ..statistics import share


@dataclass(frozen=True)
class Asked:
    """The first token of a fact's answer right after its prompt. rank: 1 where no other token is likelier."""

    probability: float
    rank: int


@dataclass(frozen=True)
class Outcome:
    """budget: what the attacker spends on one fact, by name. hits: per fact, whether the answer was got out.
    probabilities: per fact, that of the answer's first token under the attack, where the attack has one."""

    attack: str
    budget: Mapping[str, float]
    hits: tuple[bool, ...]
    subjects: tuple[str, ...]
    probabilities: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.hits or len(self.hits) != len(self.subjects):
            raise KifError(f"the attack {self.attack!r} had no facts to try; give facts that the model knows")

    @property
    def mean(self) -> float | None:
        """The mean of `probabilities`."""
        return None if self.probabilities is None else sum(self.probabilities) / len(self.probabilities)

    def part(self, start: int, end: int) -> "Outcome":
        """That of some of the facts, where each was tried by itself."""
        some = slice(start, end)
        probabilities = None if self.probabilities is None else self.probabilities[some]
        return Outcome(self.attack, self.budget, self.hits[some], self.subjects[some], probabilities)

    def share(self) -> dict[str, Any]:
        """{"tried", "success", "interval"}: Wilson's, 95 %, each fact a try."""
        return share(self.hits)


def ask(model: Any, tokenizer: Any, facts: Sequence[Fact], *, form: str = BARE, batch_size: int = BATCH) -> list[Asked]:
    """Each fact asked as `facts.answer_probabilities` asks it."""
    prompts = encode(tokenizer, facts, form=form)
    return ask_tokens(model, prompts, [first_token(tokenizer, fact.answer) for fact in facts], batch_size=batch_size)


@torch.inference_mode()
def ask_tokens(
    model: Any, prompts: Sequence[Sequence[int]], firsts: Sequence[int], *, batch_size: int = BATCH
) -> list[Asked]:
    """Per prompt of token ids: how likely its first answer token is, and its rank."""
    found: dict[int, Asked] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        logits = last_logits(model, [prompts[i] for i in some])
        found |= zip(some, judged(logits, [firsts[i] for i in some]), strict=True)
    return [found[i] for i in range(len(prompts))]


def judged(logits: torch.Tensor, firsts: Sequence[int]) -> list[Asked]:
    """logits [B, V] after each prompt."""
    wanted = torch.tensor(firsts, device=logits.device)[:, None]
    own = logits.gather(1, wanted)
    ranks = (logits > own).sum(1) + 1
    values = logits.float().softmax(-1).gather(1, wanted)[:, 0]
    return [Asked(p, rank) for p, rank in zip(values.tolist(), ranks.tolist(), strict=True)]


def asked_outcome(attack: str, budget: Mapping[str, float], facts: Sequence[Fact], asked: Sequence[Asked]) -> Outcome:
    """A hit is a first answer token that is the likeliest."""
    hits = tuple(one.rank == 1 for one in asked)
    return Outcome(attack, budget, hits, subjects_of(facts), tuple(one.probability for one in asked))


def subjects_of(facts: Sequence[Fact]) -> tuple[str, ...]:
    return tuple(fact.subject for fact in facts)


def about_others(facts: Sequence[Fact]) -> list[Fact]:
    """Facts with another subject named, so that an answer tells what is guessed: each fact's first `prior_subjects`.
    Facts that list none are left out."""
    return [fact.about(fact.prior_subjects[0]) for fact in facts if fact.prior_subjects]
