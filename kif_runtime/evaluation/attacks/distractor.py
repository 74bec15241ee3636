"""A forgotten name dropped into a question about something else, which must still be answered.

Here the harm is the other way round: what should be known breaks. Source: Huu-Tien et al. (arXiv 2501.19202).
"""

from collections.abc import Sequence
from typing import Any

from ..facts import BARE, Fact
from .outcome import Outcome, ask, subjects_of


def forgotten_name(
    model: Any, tokenizer: Any, facts: Sequence[Fact], *, name: str, form: str = BARE
) -> tuple[Outcome, float]:
    """facts: about others. Each is asked as it is and with `name` before it ("Name. prompt").

    A hit is a fact whose first answer token is the likeliest when asked plainly and no more with the name; only facts
    known plainly are tried. With the name of a subject that was not erased this is the control. Also the mean change
    of the answer's probability. Raises KifError where none is known.
    """
    plain = ask(model, tokenizer, facts, form=form)
    known = [fact for fact, one in zip(facts, plain, strict=True) if one.rank == 1]
    before = [one.probability for one in plain if one.rank == 1]
    dropped = ask(model, tokenizer, [_with(fact, name) for fact in known], form=form)
    hits = tuple(one.rank > 1 for one in dropped)
    outcome = Outcome(
        "forgotten name", {"queries": 1}, hits, subjects_of(known), tuple(one.probability for one in dropped)
    )
    return outcome, sum(one.probability - p for one, p in zip(dropped, before, strict=True)) / len(known)


def _with(fact: Fact, name: str) -> Fact:
    return Fact(fact.subject, fact.relation, f"{name}. {fact.prompt}", fact.answer)
