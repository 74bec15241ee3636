"""What the demo asks, before and after, and the checks that decide whether it showed what it claims."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kif_runtime.errors import RequestError
from kif_runtime.evaluation.facts import Fact, answer_probabilities, load_facts
from kif_runtime.evaluation.run import fact_row

from .answers import How, answer, encode
from .console import Report
from .tracing import Trace

DATA = Path(__file__).parent / "data"
FORMS = ("bare", "chat")
MOST_KEPT = 0.2  # of the excess knowledge of any one fact, either way
MOST_MOVED = 0.05  # in the probability of any one neighbour's answer
MEAN_MOVED = 0.005
OTHERS = 3  # chat questions about neighbours
BARE, CHAT = How(max_new_tokens=8), How(max_new_tokens=14, chat=True)


@dataclass(frozen=True)
class Question:
    about: str
    question: str
    answer: str


@dataclass(frozen=True)
class Script:
    """The subject; facts about it and about its neighbours; chat questions; prompts that must be left exactly as they
    are; prompts to show the gate on."""

    subject: str
    facts: list[Fact]
    neighbours: list[Fact]
    questions: list[Question]
    untouched: list[str]
    traced: list[str]


def script(subject: str | None = None) -> Script:
    """The demo about one of the countries it has facts for. Raises RequestError for another subject."""
    content = json.loads((DATA / "demo.json").read_text(encoding="utf-8"))
    facts = load_facts(DATA / "facts.jsonl")
    questions = [Question(**question) for question in content["questions"]]
    subject = subject or content["subject"]
    own = [question for question in questions if question.about == subject]
    if not own:
        known = ", ".join(dict.fromkeys(question.about for question in questions))
        raise RequestError(f"the demo has no questions about {subject!r}; choose one of {known}")
    others = {
        question.about: question for question in reversed(questions) if question.about != subject
    }  # first of each
    return Script(
        subject,
        [fact for fact in facts if fact.subject == subject],
        [fact for fact in facts if fact.subject != subject],
        [*own, *list(others.values())[::-1][:OTHERS]],
        content["untouched"],
        [text.format(subject) for text in content["traced"]],
    )


@dataclass(frozen=True)
class Asked:
    """One round of asking. Probabilities by form, in the order facts, then neighbours; texts likewise, bare; chat texts
    by question; logits [T, V] of the untouched prompts."""

    probabilities: dict[str, list[float]]
    texts: list[str]
    chat: list[str]
    logits: list[torch.Tensor]


def ask(model: Any, tokenizer: Any, script: Script, report: Report) -> Asked:
    facts = [*script.facts, *script.neighbours]
    found = {form: answer_probabilities(model, tokenizer, facts, form=form) for form in FORMS}
    work = [(fact.prompt, BARE) for fact in facts] + [(q.question, CHAT) for q in script.questions]
    texts = []
    for done, (prompt, how) in enumerate(work, 1):
        texts.append(answer(model, tokenizer, prompt, how))
        report(done, len(work), "asking")
    with torch.inference_mode():
        logits = [model(input_ids=encode(model, tokenizer, p), use_cache=False).logits[0] for p in script.untouched]
    return Asked(found, texts[: len(facts)], texts[len(facts) :], logits)


def compare(
    script: Script, before: Asked, after: Asked, priors: dict[str, list[float]], traces: Sequence[Trace]
) -> dict[str, Any]:
    """The results by fact, neighbour and question, the checks, and `passed`. priors: by form, for the facts."""
    told = list(zip(before.texts, after.texts, strict=True))
    count = len(script.facts)
    facts, neighbours = [], []
    for form in FORMS:
        moved = list(zip(before.probabilities[form], after.probabilities[form], strict=True))
        for n, fact in enumerate(script.facts):
            facts.append({"form": form} | fact_row(fact, *moved[n], priors[form][n], form))
        for n, fact in enumerate(script.neighbours, count):
            neighbours.append({"form": form} | fact_row(fact, *moved[n], 0.0, form))
    texts = [
        _told(fact.subject, fact.prompt, fact.answer, script.subject, "bare", *pair)
        for fact, pair in zip([*script.facts, *script.neighbours], told, strict=True)
    ] + [
        _told(q.about, q.question, q.answer, script.subject, "chat", b, a)
        for q, b, a in zip(script.questions, before.chat, after.chat, strict=True)
    ]
    for row in neighbours:
        del row["prior"], row["kept"], row["kind"]
    same = [torch.equal(b, a) for b, a in zip(before.logits, after.logits, strict=True)]
    untouched = [{"prompt": p, "bitwise_equal": equal} for p, equal in zip(script.untouched, same, strict=True)]
    gate = [
        {"prompt": t.prompt, "names_subject": script.subject in t.prompt, "open": sum(t.fired), "tokens": len(t.tokens)}
        for t in traces
    ]
    rows = {"facts": facts, "neighbours": neighbours, "texts": texts, "untouched": untouched, "gate": gate}
    checks = [_forgotten(facts), _silent(texts), _unmoved(neighbours), _still_told(texts), _gate(gate)]
    checks.append(_exact(untouched))
    return {"passed": all(check["passed"] for check in checks), "checks": checks} | rows


def _told(about: str, prompt: str, answer: str, subject: str, form: str, before: str, after: str) -> dict[str, Any]:
    return {
        "form": form,
        "about": about,
        "about_subject": about == subject,
        "prompt": prompt,
        "answer": answer,
        "before": _shown(before),
        "after": _shown(after),
        "told_before": answer.lower() in before.lower(),
        "told_after": answer.lower() in after.lower(),
    }


def _shown(text: str) -> str:
    return " ".join(text.split())


def _check(name: str, passed: bool, text: str, detail: str) -> dict[str, Any]:
    return {"name": name, "passed": passed, "text": text, "detail": detail}


def _forgotten(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kept = [row["kept"] for row in facts if row["kept"] is not None]
    most = max(kept, key=abs, default=1.0)
    return _check(
        "forgotten",
        bool(kept) and abs(most) <= MOST_KEPT,
        "What the model knew about the subject beyond guessing is gone.",
        f"kept of any one fact: {most:+.2f} at most, over {len(kept)} it knew; allowed ±{MOST_KEPT:g}",
    )


def _silent(texts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    known = [row for row in texts if row["about_subject"] and row["told_before"]]
    still = sum(row["told_after"] for row in known)
    return _check(
        "silent",
        bool(known) and not still,
        "It no longer says the answers it gave about the subject.",
        f"{still} of {len(known)} are still said; allowed 0",
    )


def _unmoved(neighbours: Sequence[dict[str, Any]]) -> dict[str, Any]:
    moved = [abs(row["after"] - row["before"]) for row in neighbours]
    mean, most = sum(moved) / len(moved), max(moved)
    detail = (
        f"change in probability: {mean:.4f} on average, {most:.4f} at most; allowed {MEAN_MOVED:g} and {MOST_MOVED:g}"
    )
    check = _check(
        "neighbours",
        mean <= MEAN_MOVED and most <= MOST_MOVED,
        "What it knows about the subject's neighbours has not moved.",
        detail,
    )
    return check | {"mean": mean, "most": most}


def _still_told(texts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    known = [row for row in texts if not row["about_subject"] and row["told_before"]]
    lost = sum(not row["told_after"] for row in known)
    return _check(
        "still told",
        bool(known) and not lost,
        "It still says the answers it gave about them.",
        f"{lost} of {len(known)} are lost; allowed 0",
    )


def _gate(gate: Sequence[dict[str, Any]]) -> dict[str, Any]:
    right = sum((row["open"] > 0) == row["names_subject"] for row in gate)
    return _check(
        "gate",
        right == len(gate),
        "The gate opens where the subject is named, at the very start of a text too, and nowhere else.",
        f"{right} of {len(gate)} prompts are as they should be; all must",
    )


def _exact(untouched: Sequence[dict[str, Any]]) -> dict[str, Any]:
    equal = sum(row["bitwise_equal"] for row in untouched)
    return _check(
        "exact",
        equal == len(untouched),
        "Where the subject does not occur, the model is untouched, bit for bit.",
        f"{equal} of {len(untouched)} prompts give bitwise equal logits; all must",
    )
