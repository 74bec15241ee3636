"""The same fact asked in other ways. Some come from the file of facts; those made by rule are made here.

Made by rule: a *misspelling* (two letters of the name change places), an *alias* or a *description* in the name's place
where the subject has some, and *in context* (two facts about others stand before the question, which shows the model
what form an answer has). Paraphrases, other languages and two-hop questions have to come from the file.
"""

import dataclasses
from collections.abc import Sequence

from .audit import Audit, Subject
from .evasion import swapped
from .facts import DIRECT, Fact

MADE_BY_RULE = ("alias", "misspelling", "described", "in context")
EXAMPLES = 2


def variants(audit: Audit, facts: Sequence[Fact]) -> dict[str, list[tuple[Fact, Fact]]]:
    """Kind of question → (question, the direct fact it is made of) for all `facts` that can be asked so."""
    about = {subject.name: subject for subject in audit.subjects}
    made: dict[str, list[tuple[Fact, Fact]]] = {kind: [] for kind in MADE_BY_RULE}
    for fact in facts:
        subject = about.get(fact.subject, Subject(fact.subject))
        made["alias"] += [(renamed(fact, alias, "alias"), fact) for alias in subject.aliases]
        made["described"] += [(renamed(fact, text, "described"), fact) for text in subject.descriptions]
        if (name := swapped(fact.subject)) != fact.subject:
            made["misspelling"].append((renamed(fact, name, "misspelling"), fact))
        if shown := examples(audit, fact):
            made["in context"].append((after_examples(fact, shown), fact))
    return {kind: pairs for kind, pairs in made.items() if pairs}


def renamed(fact: Fact, name: str, kind: str) -> Fact:
    """`fact` with `name` written in its subject's place; what is asked of others stays as it was."""
    prompt = fact.prompt.replace(fact.subject, name, 1)
    others = tuple(other.prompt for other in fact.asked_of_others())
    return dataclasses.replace(fact, prompt=prompt, question_kind=kind, prior_subjects=(), prior_prompts=others)


def examples(audit: Audit, fact: Fact) -> list[Fact]:
    """EXAMPLES facts about others, of the same relation where there are some; [] where there are too few."""
    others = [other for other in audit.others if other.question_kind == DIRECT and other.answer != fact.answer]
    alike = [other for other in others if other.relation == fact.relation]
    chosen = alike if len(alike) >= EXAMPLES else others
    if len(chosen) < EXAMPLES:
        return []
    return audit.random(f"examples:{fact.prompt}").sample(chosen, EXAMPLES)


def after_examples(fact: Fact, shown: Sequence[Fact]) -> Fact:
    """`fact` asked after sentences that tell the answers of `shown`."""
    told = " ".join(f"{other.prompt} {other.answer}." for other in shown) + " "
    others = tuple(told + other.prompt for other in fact.asked_of_others())
    return dataclasses.replace(
        fact, prompt=told + fact.prompt, question_kind="in context", prior_subjects=(), prior_prompts=others
    )
