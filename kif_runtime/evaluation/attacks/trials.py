"""The suite `attacks`: every attack on the erased model, with its control on the untouched one and its reference."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import KifError
from ..audit import Audit
from ..facts import BARE, DIRECT, Fact
from ..states import State
from . import (
    ablation,
    distractor,
    extraction,
    prompting,
    quantisation,
    relearning,
    removed,
    sampling,
    soft_prompt,
)
from .outcome import Outcome, about_others, ask, asked_outcome
from .removed import Try

PROMPT, GATE, WEIGHTS = "prompt", "gate", "weights"
ALONE = ("head projection", "probability delta", "quantised, nf4", "quantised, int8", "quantised, int4",
         "relearned, other text")  # fmt: skip
QUICK_WAYS = ("lower case", "letters swapped", "space inside", "zero-width space", "Cyrillic look-alikes", "leetspeak")


@dataclass(frozen=True)
class Trial:
    """One attack as the suite makes it. access: what the attacker holds. ready: called with facts while no state is on,
    gives the attack. alone: each fact is tried by itself, whatever others are tried. injects: states of the untouched
    model are put in, so that only a model that never knew can show what comes from these alone; and what is put in
    hangs on the erased model. teaches: the answers asked for are trained on, which shows nothing without a level."""

    name: str
    access: str
    ready: Callable[[Sequence[Fact]], Try]
    alone: bool = False
    injects: bool = False
    teaches: bool = False

    @property
    def relearns(self) -> bool:
        """Whether how much faster it comes back than in the reference is told, too."""
        return self.name.startswith("relearned")


def run(audit: Audit) -> dict[str, Any]:
    """How much each attack draws out of the erased model again: asking, getting round a gate, changing weights.

    {"known": facts known before, "attacks": [suites.Attack], "without_reference": rows of the same form whose success
    cannot be judged without a model that never knew, "not_tried": [{"name", "why"}], "forgotten_name": what a forgotten
    name in a question about others breaks, or None}. Reference: the model that never knew, or else the
    untouched model asked the same facts of other subjects (`prior_subjects`).
    """
    known = [fact for fact in audit.known() if fact.question_kind == DIRECT]
    if not known:
        raise KifError("the untouched model knows none of the facts; give facts that it knows")
    rows: list[dict[str, Any]] = []
    unjudged: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    trials = chosen(audit)
    for done, trial in enumerate(trials):
        audit.report(done, len(trials), "attacks")
        try:
            made = row(audit, trial, known)
            judged = made["reference"] is not None or not (trial.injects or trial.teaches)
            (rows if judged else unjudged).append(made)
        except KifError as problem:
            skipped.append({"name": trial.name, "why": str(problem)})
    if audit.after.removable:
        rows.append(gate_off(audit, known))
        alone = "" if audit.after.ungated is None else ", and audit the adapter alone"
        skipped.append({"name": "weights", "why": f"whoever holds the weights takes the gate off; see that row{alone}"})
    audit.report(len(trials), len(trials), "attacks")
    return {
        "known": len(known),
        "attacks": rows,
        "without_reference": unjudged,
        "not_tried": skipped,
        "forgotten_name": forgotten_name(audit),
    }


def chosen(audit: Audit) -> list[Trial]:
    """The attacks that fit what was erased and how: a gate's weights are not attacked, it is just taken off."""
    trials = prompt_trials(audit)
    return trials if audit.after.removable else trials + weight_trials(audit)


def prompt_trials(audit: Audit) -> list[Trial]:
    less = functools.partial
    roles = prompting.ROLES[: audit.pick(quick=1, full=len(prompting.ROLES))]
    samples, shots = audit.pick(quick=4, full=sampling.SAMPLES), audit.pick(quick=8, full=prompting.SHOTS)
    tokens, ways = audit.pick(quick=8, full=prompting.NEW_TOKENS), audit.pick(quick=QUICK_WAYS, full=None)
    examples = [fact for fact in audit.others if fact.question_kind == DIRECT]
    described = {subject.name: subject.descriptions[0] for subject in audit.subjects if subject.descriptions}
    tries: dict[str, Try] = {
        "prefill": less(prompting.prefill, new_tokens=tokens),
        "role play": less(prompting.role_play, roles=roles, new_tokens=tokens),
        "many-shot": less(prompting.many_shot, examples=examples, shots=shots, new_tokens=tokens),
        "name written otherwise": less(prompting.evade_names, ways=ways, descriptions=described, form=audit.form),
        "best of N": less(sampling.best_of_n, samples=samples, new_tokens=tokens, seed=audit.seed, form=audit.form),
    }
    return [Trial(name, PROMPT, _as_is(one), True) for name, one in tries.items() if name != "many-shot" or examples]


def weight_trials(audit: Audit) -> list[Trial]:
    less = functools.partial
    steps, text = audit.pick(quick=5, full=relearning.STEPS), audit.text or ""
    examples = [fact for fact in audit.others if fact.question_kind == DIRECT]
    tries: dict[str, Try] = {
        "head projection": less(extraction.head_projection, form=audit.form),
        "probability delta": less(extraction.probability_delta, form=audit.form),
        "quantised, nf4": less(quantisation.quantised_answers, scheme="nf4"),
        "relearned, same facts": less(relearning.relearn_same, steps=steps),
    }
    if examples:
        tries["direction ablation"] = less(ablation.ablate_directions, others=examples[:32], form=audit.form)
    if not audit.quick:
        tries |= {
            "quantised, int8": less(quantisation.quantised_answers, scheme="int8"),
            "quantised, int4": less(quantisation.quantised_answers, scheme="int4"),
            "relearned, held-out facts": less(relearning.relearn_held_out, steps=steps),
            "relearned, other text": less(relearning.relearn_text, text=text, steps=steps),
            "soft prompt": less(soft_prompt.soft_prompt, seed=audit.seed, form=audit.form),
        }
    trials = [
        Trial(name, WEIGHTS, _as_is(one), name in ALONE, teaches=name in ("relearned, same facts", "soft prompt"))
        for name, one in tries.items()
    ]
    trials.append(Trial("removed directions put back", WEIGHTS, removed.Directions(audit), injects=True))
    if not audit.quick:
        trials.append(Trial("sparse features put back", WEIGHTS, removed.Features(audit), injects=True))
    return trials


def row(audit: Audit, trial: Trial, known: Sequence[Fact]) -> dict[str, Any]:
    """One `suites.Attack`, and the answer's mean probability where the attack has one."""
    never, others = (audit.reference, known) if audit.reference else (audit.before, about_others(known))
    others = [] if trial.injects and not audit.reference else others
    found = tried(audit, audit.after, trial, known)
    reference: Outcome | None
    if trial.alone and never is audit.before and others:  # one round for both: a model is tuned, or rounded, once
        both = tried(audit, never, trial, [*known, *others])
        control = both.part(0, len(known))
        reference = both.part(len(known), len(both.hits))
    else:
        control = tried(audit, audit.before, trial, known)
        reference = tried(audit, never, trial, others) if others else None
    made = outcome_row(found, trial.access) | {"control": control.share(), "reference": None, "probability": found.mean}
    if reference is None:
        return made
    made |= {"reference": reference.share(), "reference_probability": reference.mean}
    if trial.relearns and found.mean is not None and reference.mean is not None:
        before, usual = mean_asked(audit, audit.after, known), mean_asked(audit, never, others)
        made["robustness"] = relearning.relearning_robustness(before, found.mean, usual, reference.mean)
    return made


def mean_asked(audit: Audit, state: State, facts: Sequence[Fact]) -> float:
    """The mean probability of the answers' first tokens, asked plainly."""
    return sum(audit.probabilities(state, facts, BARE)) / len(facts)


def tried(audit: Audit, state: State, trial: Trial, facts: Sequence[Fact]) -> Outcome:
    """What the attack gets out of one state: once, unless what it puts in comes from the erased model."""
    attempt = trial.ready(facts)
    hangs_on = [audit.after.identity] if trial.injects else []
    return audit.once(
        state,
        ["attack", trial.name, tuple(facts), *hangs_on],
        lambda on: attempt(on.model, audit.tokenizer, facts),
        asked_prompts,
    )


def asked_prompts(found: Outcome) -> int:
    return round(found.budget.get("queries", 1)) * len(found.hits)


def _as_is(attempt: Try) -> Callable[[Sequence[Fact]], Try]:
    return lambda facts: attempt


def outcome_row(found: Outcome, access: str) -> dict[str, Any]:
    budget = ", ".join(f"{amount:g} {what}" for what, amount in found.budget.items())
    return {"name": found.attack, "access": access, "budget": budget} | found.share()


def gate_off(audit: Audit, known: Sequence[Fact]) -> dict[str, Any]:
    """What anybody gets who holds the weights: the model without its gate, and with its adapter if it has one."""
    control = _asked_plainly(audit, audit.before, known)
    found = control if audit.after.ungated is None else _asked_plainly(audit, audit.after.ungated, known)
    return outcome_row(found, GATE) | {"control": control.share(), "reference": None}


def _asked_plainly(audit: Audit, state: State, known: Sequence[Fact]) -> Outcome:
    with audit.running(state) as on:
        asked = ask(on.model, audit.tokenizer, known, form=audit.form)
    return asked_outcome("gate taken off", {"queries": 1}, known, asked)


def forgotten_name(audit: Audit) -> list[dict[str, Any]] | None:
    """Per state, the share of known facts about others that break when a forgotten name stands before the question."""
    if not audit.others:
        return None
    facts = [fact for fact in audit.others if fact.question_kind == DIRECT][: audit.pick(quick=16, full=64)]
    table = []
    for state in audit.states:
        try:
            found, change = with_name(audit, state, facts, audit.subjects[0].name)
        except KifError:  # nothing about others is known in this state, so nothing can break
            continue
        table.append({"state": state.name, "broken": found.share(), "change": change})
    return table or None


def with_name(audit: Audit, state: State, facts: Sequence[Fact], name: str) -> tuple[Outcome, float]:
    return audit.once(
        state,
        ["forgotten name", name, tuple(facts)],
        lambda on: distractor.forgotten_name(on.model, audit.tokenizer, facts, name=name, form=audit.form),
        lambda found: len(facts) + len(found[0].hits),
    )
