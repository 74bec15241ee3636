"""Before and after: everything that an erasure of one or more subjects is judged by, as one JSON-able table."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from ..errors import KifError
from .audit import Audit, Subject
from .facts import BARE, Fact, Progress, excess_kept
from .kinds import kind_of, name_states
from .states import Running, State
from .statistics import bootstrap, summary
from .surface import mentions
from .text import TOKENS, WINDOW, predicted, sample_text

LEAST_EXCESS = 0.15
DISTANCES = ("nearest third", "middle third", "farthest third")


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

    @contextmanager
    def enter() -> Iterator[Running]:
        with attach() as gate:
            yield Running(model, gate if hasattr(gate, "fired") and hasattr(gate, "reset") else None)

    audit = Audit(
        State("before", lambda: nullcontext(model)),
        State("after", enter),
        tokenizer,
        [Subject(name) for name in dict.fromkeys(fact.subject for fact in facts)],
        facts,
        neighbours or (),
        text,
        form=form,
        least_excess=least_excess,
        progress=progress,
    )
    table = {"form": form, "least_excess": least_excess} | direct_table(audit, facts)
    table["neighbours"] = neighbour_rows(audit) if audit.others else None
    return table | {"text": None if text is None else text_rows(audit, window=window, tokens=tokens)}


def direct_table(audit: Audit, asked: Sequence[Fact]) -> dict[str, Any]:
    """Before and after for each of `asked`, and the summaries of what is kept."""
    before, after = (audit.probabilities(state, asked) for state in (audit.before, audit.after))
    priors = audit.priors(asked)
    rows = [
        fact_row(fact, b, a, p, audit.form, audit.least_excess)
        for fact, b, a, p in zip(asked, before, after, priors, strict=True)
    ]
    return {"facts": rows} | kept_summaries(rows)


def neighbour_rows(audit: Audit) -> dict[str, Any]:
    """Mean |Δp| of facts about others, and the same by how near they are to the subject."""
    if not audit.others:
        raise KifError("the suite neighbours needs facts about others; give --neighbours FILE")
    before, after = (audit.probabilities(state, audit.others) for state in (audit.before, audit.after))
    moved = [abs(a - b) for a, b in zip(after, before, strict=True)]
    return neighbour_table(audit.others, before, after) | {"by_distance": by_distance(audit, moved)}


def by_distance(audit: Audit, moved: Sequence[float]) -> list[dict[str, Any]]:
    """The |Δp| of each of `audit.others` in thirds: the nearest to any subject, the middle, the farthest.

    Near is alike in what the untouched model makes of the two names (`kinds.name_states`). [] for under six others.
    """
    own = [subject.name for subject in audit.subjects]
    others = [name for name in dict.fromkeys(fact.subject for fact in audit.others) if name not in own]
    if len(others) < 2 * len(DISTANCES):
        return []
    names = [*own, *others]
    states = audit.once(
        audit.before,
        ["names", *names],
        lambda on: name_states(on.model, audit.tokenizer, names),
        lambda found: len(found),
    )
    alike = (states[len(own) :] @ states[: len(own)].T).amax(1)
    order = [others[i] for i in alike.argsort(descending=True).tolist()]
    third = {name: n * len(DISTANCES) // len(order) for n, name in enumerate(order)}
    rows = []
    for n, distance in enumerate(DISTANCES):
        some = [i for i, fact in enumerate(audit.others) if third.get(fact.subject) == n]
        values = [moved[i] for i in some]
        ends = bootstrap(values, [audit.others[i].subject for i in some])
        rows.append({"distance": distance, "facts": len(some), "mean": sum(values) / len(values), "interval": ends})
    return rows


def running_text(audit: Audit) -> dict[str, Any]:
    """Perplexity of running text before and after, which of its tokens the gate touched, and false fires."""
    tokens = audit.pick(quick=TOKENS // 5, full=TOKENS)
    table = text_rows(audit, tokens=tokens)
    return table | false_fires(audit, tokens, table["touched"])


def false_fires(audit: Audit, tokens: int | None, touched: dict[str, int] | None) -> dict[str, Any]:
    """{"false_fires", "false_fire_share"}: tokens that fire in the text without the paragraphs that name a subject.

    What fires there was not meant to. None without a gate, or where every paragraph names one.
    """
    nothing = {"false_fires": None, "false_fire_share": None}
    if touched is None or audit.text is None:
        return nothing
    names = [name for subject in audit.subjects for name in subject.names]
    rest = "".join(line for line in audit.text.splitlines(keepends=True) if not mentions(line, names))
    if len(audit.tokenizer(rest[:200], add_special_tokens=False)["input_ids"]) < 2:
        return nothing
    ids = sample_text(audit.tokenizer, rest, tokens=tokens).ids
    _, fired = audit.losses(audit.after, ids)
    count = sum((fired or {}).values())
    return {"false_fires": count, "false_fire_share": count / ids.numel()}


def text_rows(audit: Audit, *, window: int = WINDOW, tokens: int | None = TOKENS) -> dict[str, Any]:
    """Perplexity before and after, and which tokens the gate touched."""
    if audit.text is None:
        raise KifError("the suite text needs running text; give --text FILE")
    ids = sample_text(audit.tokenizer, audit.text, window=window, tokens=tokens).ids
    before, _ = audit.losses(audit.before, ids)
    after, fired = audit.losses(audit.after, ids)
    table = text_table(before, after, predicted(ids)) | {"tokens": ids.numel(), "touched": fired}
    # a token on which two capsules fire is counted by both: exact for one capsule, an upper bound for several
    share = None if fired is None else min(1.0, sum(fired.values()) / ids.numel())
    return table | {"touched_share": share}


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
