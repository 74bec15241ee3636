"""The suite `facts`: what is kept of what the model knew, asked directly and in every other way that is to be had."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import KifError
from .audit import Audit
from .facts import DIRECT, QUESTION_KINDS, Fact, encode, excess_kept, first_token
from .questions import variants
from .run import direct_table
from .statistics import summary


def run(audit: Audit) -> dict[str, Any]:
    """Knowledge kept, rank of the answer and greedy accuracy, by kind of question.

    {"facts", "kept", "kept_first", "kept_later": as `run.evaluate` has them, over the direct questions; "questions":
    [{"question": kind, "made", "asked", "known", "kept": summary, "greedy": {state: share}, "rank": {state: median}}]}.
    A question counts where the untouched model knows the answer when asked that way.
    """
    direct = [fact for fact in audit.facts if fact.question_kind == DIRECT]
    if not direct:
        raise KifError("no fact is a direct question; give some without 'question_kind'")
    made = variants(audit, direct)
    questions = []
    for kind in QUESTION_KINDS:
        given = [fact for fact in audit.facts if fact.question_kind == kind]
        by_rule = [question for question, _ in made.get(kind, [])]
        if given or by_rule:
            questions.append({"question": kind} | question_row(audit, given, by_rule))
    return direct_table(audit, direct) | {"questions": questions}


def question_row(audit: Audit, given: Sequence[Fact], by_rule: Sequence[Fact]) -> dict[str, Any]:
    """One kind of question. given: from the file; by_rule: made here."""
    facts = [*given, *by_rule]
    priors = audit.priors(facts)
    states = {state.name: probability_and_rank(audit, state, facts) for state in audit.states}
    before, after = states[audit.before.name], states[audit.after.name]
    known = [i for i, prior in enumerate(priors) if before[i][0] - prior >= audit.least_excess]
    kept = [excess_kept(before[i][0], after[i][0], priors[i]) for i in known]
    row: dict[str, Any] = {
        "made": "by rule" if not given else "from the file" if not by_rule else "from the file and by rule",
        "asked": len(facts),
        "known": len(known),
        "kept": summary(kept, [facts[i].subject for i in known]),
    }
    if known:
        row["greedy"] = {name: share_greedy([found[i][1] for i in known]) for name, found in states.items()}
        row["rank"] = {name: float(np.median([found[i][1] for i in known])) for name, found in states.items()}
    return row


def probability_and_rank(audit: Audit, state: Any, facts: Sequence[Fact]) -> list[tuple[float, int]]:
    """Per fact, the probability of the answer's first token, and its rank among all tokens: 1 is the greedy one."""
    readings = audit.read(state, encode(audit.tokenizer, facts, form=audit.form), f"{state.name}: questions")
    found = []
    for reading, fact in zip(readings, facts, strict=True):
        own = reading.log_probs[first_token(audit.tokenizer, fact.answer)]
        found.append((float(own.exp()), 1 + int((reading.log_probs > own).sum())))
    return found


def share_greedy(ranks: Sequence[int]) -> float:
    """The share of answers that greedy decoding begins with."""
    return sum(rank == 1 for rank in ranks) / len(ranks)
