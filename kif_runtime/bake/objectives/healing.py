"""The self-healing loop: train, evaluate, and go on until the erasure truly holds or the budget ends.

Source: arXiv 2601.10566. Its criteria: SMR ≤ 5 %, and the EL10 *ratio* < 1, for several rounds in a row. The ratio is
the mean probability of the subject's name and keyword tokens over the first ten greedy steps, after ÷ before, where
*before* is the untouched model; the authors' own records compare the absolute mass with 1, which always holds.
"""

from collections.abc import Callable
from dataclasses import dataclass

SMR_LIMIT = 0.05


@dataclass(frozen=True)
class Leakage:
    """smr: share of generations about the subject that name it. el10: the mass now, el10_before: untouched."""

    smr: float
    el10: float
    el10_before: float

    @property
    def ratio(self) -> float:
        return self.el10 / self.el10_before if self.el10_before > 0 else float("inf")

    @property
    def holds(self) -> bool:
        """False for NaN, and where the untouched model put no mass there: then the ratio says nothing."""
        return self.smr <= SMR_LIMIT and self.ratio < 1


@dataclass(frozen=True)
class Healing:
    """Every round's leakage, the last first to hold `needed` times in a row, or not: then the budget ended."""

    rounds: tuple[Leakage, ...]
    healed: bool


def heal(
    train: Callable[[int], None], evaluate: Callable[[], Leakage], *, needed: int = 3, budget: int = 10
) -> Healing:
    """Calls train(round) and then evaluate(), until the criteria hold `needed` rounds in a row or `budget` rounds ran.

    train should use another seed in each round, so that what holds does not hold for one order of samples only.
    """
    rounds: list[Leakage] = []
    held = 0
    for number in range(budget):
        train(number)
        rounds.append(evaluate())
        held = held + 1 if rounds[-1].holds else 0
        if held == needed:
            return Healing(tuple(rounds), True)
    return Healing(tuple(rounds), False)
