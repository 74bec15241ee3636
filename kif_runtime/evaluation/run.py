"""Before and after: everything that an erasure of one or more subjects is judged by, as one JSON-able table."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import KifError
from .facts import BARE, Fact, Progress, answer_probabilities, excess_kept, prior_probabilities
from .kinds import kind_of
from .statistics import bootstrap, summary
from .text import TOKENS, WINDOW, predicted, sample_text, window_losses

LEAST_EXCESS = 0.15


def evaluate(
    model: Any,
    tokenizer: Any,
    attach: Callable[[], Any],
    *,
    facts: Sequence[Fact],
    neighbours: Sequence[Fact] | None = None,
    text: str | None = None,
    form: str = BARE,
    least_excess: float = LEAST_EXCESS,
    window: int = WINDOW,
    tokens: int | None = TOKENS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What the model knows bare and with `attach()`, a context manager that puts the erasure on and takes it off again.

    facts: about the erased subjects; p_before and p_prior are measured here, in `form`, on this model. A fact counts
    where before − prior is at least `least_excess`; the others are listed with `kept` None. neighbours: facts about
    others, whose probabilities should not move. text: running text for perplexity. Where what `attach()` gives has
    `fired` and `reset()`, the tokens that were touched are counted.

    Result: {"form", "least_excess", "facts": [{subject, relation, kind, prompt, answer, first, before, after, prior,
    kept}], "kept": summary, "kept_first", "kept_later": the same for prompts that begin with the subject and those that
    do not, "neighbours": {...} or None, "text": {...} or None}. Raises KifError for no facts.
    """
    if not facts:
        raise KifError("there are no facts to evaluate; give some about the erased subjects")
    others = list(neighbours or ())
    sample = None if text is None else sample_text(tokenizer, text, window=window, tokens=tokens)
    options: dict[str, Any] = {"form": form, "progress": progress}

    priors = _priors(model, tokenizer, facts, options)
    asked = [*facts, *others]
    before = answer_probabilities(model, tokenizer, asked, **options)
    losses = None if sample is None else window_losses(model, sample.ids, progress=progress)
    with attach() as kif:
        after = answer_probabilities(model, tokenizer, asked, **options)
        touched = None
        if sample is not None and losses is not None:
            _reset(kif)
            after_losses = window_losses(model, sample.ids, progress=progress)
            touched = _text_table(losses, after_losses, predicted(sample.ids), sample.ids.numel(), kif)

    n = len(facts)
    rows = [
        fact_row(fact, b, a, p, form, least_excess)
        for fact, b, a, p in zip(facts, before[:n], after[:n], priors, strict=True)
    ]
    table = {"form": form, "least_excess": least_excess, "facts": rows} | kept_summaries(rows)
    table["neighbours"] = neighbour_table(others, before[n:], after[n:]) if others else None
    return table | {"text": touched}


def fact_row(
    fact: Fact, before: float, after: float, prior: float, form: str = BARE, least_excess: float = LEAST_EXCESS
) -> dict[str, Any]:
    """One fact's numbers; `kept` is None where the model did not know it in this form. first: whether the subject
    stands at the very start of the sequence, which in chat form it never does."""
    known = before - prior >= least_excess
    return {
        "subject": fact.subject,
        "relation": fact.relation,
        "kind": kind_of(fact.relation, fact.prompt, fact.subject),
        "prompt": fact.prompt,
        "answer": fact.answer,
        "first": form == BARE and fact.at_start,
        "before": before,
        "after": after,
        "prior": prior,
        "kept": excess_kept(before, after, prior) if known else None,
    }


def kept_summaries(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summaries of `kept` over all rows that have it, and by where the subject stands."""

    def over(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
        counted = [row for row in some if row["kept"] is not None]
        return summary([row["kept"] for row in counted], [row["subject"] for row in counted])

    return {
        "kept": over(rows),
        "kept_first": over([row for row in rows if row["first"]]),
        "kept_later": over([row for row in rows if not row["first"]]),
    }


def neighbour_table(facts: Sequence[Fact], before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Mean |Δp| with its interval over subjects, and the fact that moved most."""
    moved = [abs(a - b) for a, b in zip(after, before, strict=True)]
    worst = max(range(len(moved)), key=moved.__getitem__)
    return {
        "facts": len(facts),
        "subjects": len({fact.subject for fact in facts}),
        "mean": sum(moved) / len(moved),
        "interval": bootstrap(moved, [fact.subject for fact in facts]),
        "worst": {"prompt": facts[worst].prompt, "before": before[worst], "after": after[worst]},
    }


def text_table(before: Sequence[float], after: Sequence[float], count: int) -> dict[str, Any]:
    """Perplexities from summed losses per window, over `count` predicted tokens."""
    old, new = math.exp(sum(before) / count), math.exp(sum(after) / count)
    return {"before": old, "after": new, "ratio": new / old, "predicted": count}


def _text_table(before: Sequence[float], after: Sequence[float], count: int, tokens: int, kif: Any) -> dict[str, Any]:
    table = text_table(before, after, count) | {"tokens": tokens, "touched": None, "touched_share": None}
    fired = getattr(kif, "fired", None)
    if fired is not None:
        table["touched"] = dict(fired)
        # a token on which two capsules fire is counted by both: exact for one capsule, an upper bound for several
        table["touched_share"] = min(1.0, sum(fired.values()) / tokens)
    return table


def _reset(kif: Any) -> None:
    if hasattr(kif, "reset"):
        kif.reset()


def _priors(model: Any, tokenizer: Any, facts: Sequence[Fact], options: dict[str, Any]) -> list[float]:
    """Measured where a fact lists others to ask about, else what its file says, else 0: then nothing can be guessed."""
    measured = prior_probabilities(model, tokenizer, facts, **options)
    return [value if value is not None else (fact.p_prior or 0.0) for value, fact in zip(measured, facts, strict=True)]
