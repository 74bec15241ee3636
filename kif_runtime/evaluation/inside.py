"""The latent half of the suite `dual`: what is left inside the erased model, block by block."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .audit import Audit
from .facts import Fact, encode, first_token
from .latent import Lens, drift, identity_probe, linear_cka, neighbour_overlap, separation
from .patching import answer_states, depth_score, patched_log_probs
from .states import Running, State
from .statistics import interval, share

READ = (
    "{} is known for",
    "Much has been written about {}, and",
    "The first thing to say of {} is that",
    "Yesterday we talked about {} for",
    "Nobody here has asked about {} before, so",
    "In short, {} was",
    "A book about {} would begin with",
    "If you ask me about {}, the answer is",
)
FEWEST_OTHERS = 3
GONE = 0.01  # a probability of the answer (a token, on average) under which other names say no more than that
SOURCES = 6  # other names put in the subject's place, where no reference model is to be had


@dataclass(frozen=True)
class Mentions:
    """States of prompts that mention a name, [N, L, D] by state name; which entity and which prompt each input is.

    The first `own` entities are the subjects.
    """

    states: dict[str, Tensor]
    entity: Tensor
    prompt: Tensor
    own: int

    @property
    def is_own(self) -> Tensor:
        return self.entity < self.own


def inside(audit: Audit, known: Sequence[Fact]) -> dict[str, Any]:
    """Every part of the latent side; None where there is nothing to measure it on, with `why` in words."""
    read = read_mentions(audit)
    before, after = read.states[audit.before.name], read.states[audit.after.name]
    return {
        "srs": selectivity(before, after, read.is_own),
        "similarity": similarity(before, after, read.is_own),
        "probe": probe(audit, read),
        "separation": separations(before, after, read),
        "lens": lens(audit, known),
        "patching": patching(audit, known),
    }


def read_mentions(audit: Audit) -> Mentions:
    own = [subject.name for subject in audit.subjects]
    others = [name for name in dict.fromkeys(fact.subject for fact in audit.others) if name not in own]
    names = own + others[: audit.pick(quick=6, full=15)]
    templates = READ[: audit.pick(quick=5, full=len(READ))]
    prompts = [audit.tokenizer(text.format(name))["input_ids"] for name in names for text in templates]
    states = {
        state.name: torch.stack([reading.blocks for reading in audit.read(state, prompts, f"{state.name}: mentions")])
        for state in audit.states
    }
    entity = torch.arange(len(names)).repeat_interleave(len(templates))
    return Mentions(states, entity, torch.arange(len(templates)).repeat(len(names)), len(own))


def selectivity(before: Tensor, after: Tensor, own: Tensor) -> dict[str, Any]:
    """SRS: the drift of states that mention a subject ÷ that of others. `score` is None where others do not drift."""
    moved = drift(before, after)
    forget = float(moved[own].mean())
    benign = float(moved[~own].mean()) if (~own).any() else None
    return {"forget": forget, "benign": benign, "score": forget / benign if benign and benign > 1e-9 else None}


def similarity(before: Tensor, after: Tensor, own: Tensor) -> list[dict[str, Any]]:
    """Per block, linear CKA and k-NN overlap with the untouched model, over mentions of the subjects and of others."""
    table = []
    for block in range(before.shape[1]):
        row: dict[str, Any] = {"block": block}
        for what, chosen in (("own", own), ("others", ~own)):
            x, y = before[chosen, block], after[chosen, block]
            enough = len(x) > 2
            row[f"cka_{what}"] = linear_cka(x, y) if enough else None
            row[f"neighbours_{what}"] = neighbour_overlap(x, y) if enough else None
        table.append(row)
    return table


def probe(audit: Audit, read: Mentions) -> dict[str, Any]:
    """Whether a linear probe tells which name was mentioned, at a few blocks: on each state by itself, and learned on
    the untouched model and asked of the erased one (`moved`), where what is left has to be where it was."""
    entities = int(read.entity.max()) + 1
    if entities - read.own < FEWEST_OTHERS:
        return {"blocks": None, "why": f"it needs facts about at least {FEWEST_OTHERS} others; give --neighbours"}
    depth = read.states[audit.before.name].shape[1]
    blocks = sorted({depth * part // 4 - 1 for part in audit.pick(quick=(2, 4), full=(1, 2, 3, 4))} - {-1})
    pairs = {name: (states, states) for name, states in read.states.items()}
    pairs["moved"] = (read.states[audit.before.name], read.states[audit.after.name])
    table = []
    for done, block in enumerate(blocks, 1):
        row: dict[str, Any] = {"block": block}
        for name, (train, test) in pairs.items():
            right = identity_probe(train[:, block], test[:, block], read.entity.tolist(), read.prompt.tolist())
            own = read.is_own.numpy()
            row[name] = {"own": share(right[own].tolist()), "others": share(right[~own].tolist())}
        table.append(row)
        audit.report(done, len(blocks), "probes")
    return {"blocks": table, "chance": 1 / entities, "why": None}


def separations(before: Tensor, after: Tensor, read: Mentions) -> list[dict[str, Any]]:
    """Per block, Cohen's d of subject against others along the untouched model's difference of means; the direction is
    found on every other prompt and judged on the rest."""
    fitting = read.prompt % 2 == 0
    table = []
    for block in range(before.shape[1]):
        x, y, own = before[:, block], after[:, block], read.is_own
        if not (~own).any():
            return []
        direction = x[fitting & own].mean(0) - x[fitting & ~own].mean(0)
        judged = [separation(z[~fitting & own], z[~fitting & ~own], direction) for z in (x, y)]
        table.append({"block": block, "before": judged[0], "after": judged[1]})
    return table


def lens(audit: Audit, known: Sequence[Fact]) -> dict[str, Any]:
    """The logit lens by block: the answer's probability in each state, and for others in the subject's place.

    kept: per fact, the largest excess over the prior at any block after ÷ before, in [0, 1].
    """
    if not known:
        return {"blocks": None, "why": "no fact was known beforehand"}
    if not _lens_fits(audit, known):
        return {"blocks": None, "why": "this model goes from its last block to its logits in another way"}
    looked = {state.name: _through(audit, state, known) for state in audit.states}
    prior = _prior_through(audit, known)
    before, after = looked[audit.before.name], looked[audit.after.name]
    kept = ((after - prior).amax(1) / (before - prior).amax(1).clamp_min(1e-6)).clamp(0, 1).tolist()
    blocks = [
        {"block": b} | {name: float(values[:, b].mean()) for name, values in (looked | {"prior": prior}).items()}
        for b in range(before.shape[1])
    ]
    subjects = [fact.subject for fact in known]
    found = {"facts": len(kept), "kept": sum(kept) / len(kept), "interval": interval(kept, subjects)}
    return {"blocks": blocks, "why": None} | found


def _lens_fits(audit: Audit, facts: Sequence[Fact]) -> bool:
    """Asked of the untouched model: a filter on what is said leaves the states alone, and must not blind the lens."""
    readings = audit.read(audit.before, encode(audit.tokenizer, facts, form=audit.form))
    with audit.running(audit.before) as on:
        final = Lens(on.model).log_probs(torch.stack([reading.blocks[-1] for reading in readings]))
    return Lens.fits_to(final, torch.stack([reading.log_probs for reading in readings]))


def _through(audit: Audit, state: State, facts: Sequence[Fact]) -> Tensor:
    """[F, L]: the probability of each fact's answer that the lens sees after each block."""
    readings = audit.read(state, encode(audit.tokenizer, facts, form=audit.form), f"{state.name}: lens")
    firsts = [first_token(audit.tokenizer, fact.answer) for fact in facts]
    with audit.running(state) as on:
        through = Lens(on.model)
        rows = [through.log_probs(r.blocks)[:, id].exp() for r, id in zip(readings, firsts, strict=True)]
    return torch.stack(rows)


def _prior_through(audit: Audit, facts: Sequence[Fact]) -> Tensor:
    """[F, L]: the same for others in the subject's place, in the untouched model; where a fact lists none, what it says
    that guessing gives, at every block."""
    others = [(i, other) for i, fact in enumerate(facts) for other in fact.asked_of_others()]
    seen = _through(audit, audit.before, [*facts[:1], *(other for _, other in others)])[1:]
    owner = torch.tensor([i for i, _ in others], dtype=torch.long)
    total = torch.zeros(len(facts), seen.shape[1]).index_add_(0, owner, seen)
    count = owner.bincount(minlength=len(facts))[:, None]
    told = torch.tensor([fact.p_prior or 0.0 for fact in facts])[:, None]
    return torch.where(count > 0, total / count.clamp_min(1), told)


def patching(audit: Audit, known: Sequence[Fact]) -> dict[str, Any]:
    """UDS per fact, its mean and interval, and the mean drop by block. Where there is no reference model, what never
    knew is the mean of the untouched model's states for other names in the subject's place, down to p = GONE."""
    against = "a reference model" if audit.reference else "the untouched model, asked about others"
    facts = [fact for fact in known if audit.reference or fact.prior_subjects]
    drops, levels, scores, subjects = [], [], [], []
    for done, fact in enumerate(facts, 1):
        drop, level = _drops(audit, fact)
        score = depth_score(drop, level)
        drops.append(drop)
        levels.append(level)
        if score is not None:
            scores.append(score)
            subjects.append(fact.subject)
        audit.report(done, len(facts), "patching")
    table: dict[str, Any] = {"against": against, "facts": len(scores), "score": None, "interval": None, "blocks": []}
    if not facts:
        return table | {"why": "no known fact lists others to ask about, and there is no reference model"}
    if not scores:
        return table | {"why": "at no block does the answer hang on what is read there"}
    table |= {"score": sum(scores) / len(scores), "interval": interval(scores, subjects), "why": None}
    means = zip(torch.stack(drops).mean(0).tolist(), torch.stack(levels).mean(0).tolist(), strict=True)
    return table | {"blocks": [{"block": b, "drop": d, "never_knew": n} for b, (d, n) in enumerate(means)]}


def _drops(audit: Audit, fact: Fact) -> tuple[Tensor, Tensor]:
    """[L] each: the drop with the erased model's states, and with those of what never knew."""
    (prompt,) = encode(audit.tokenizer, [fact], form=audit.form)
    answer = audit.tokenizer(" " + fact.answer, add_special_tokens=False)["input_ids"]
    ids, length = [*prompt, *answer], len(answer)
    whole, level = _levels(audit, fact, ids, length)
    with audit.running(audit.after) as on:
        erased = answer_states(on.model, ids, length)
    with audit.running(audit.before) as on:
        known = patched_log_probs(on.model, ids, length, erased)
    return whole - known, whole - level


def _levels(audit: Audit, fact: Fact, ids: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
    """log p of the answer with the untouched model's own states, [1], and with those of what never knew, [L]."""
    if audit.reference:
        with audit.running(audit.reference) as on:
            never = answer_states(on.model, ids, length)

    def levels(on: Running) -> tuple[Tensor, Tensor]:
        own = answer_states(on.model, ids, length)[:1]  # put back where it came from, at whatever block
        source = never if audit.reference else _others(on.model, audit, fact, ids[len(ids) - length :])
        whole, level = (patched_log_probs(on.model, ids, length, states) for states in (own, source))
        # another name is surer of its own answer than one that never knew is of any
        return whole, level if audit.reference else level.clamp_min(math.log(GONE))

    what = ["patching", fact, audit.form, audit.reference and audit.reference.identity]
    return audit.once(audit.before, what, levels, lambda found: 1 + len(found[1]))


def _others(model: Any, audit: Audit, fact: Fact, answer: Sequence[int]) -> Tensor:
    """[L, A, D]: the mean of the states for other names in the subject's place. One of them alone has an answer of its
    own and is sure of it; what many have in common has less of one."""
    others = [fact.about(name) for name in fact.prior_subjects[:SOURCES]]
    asked = encode(audit.tokenizer, others, form=audit.form)
    return torch.stack([answer_states(model, [*other, *answer], len(answer)) for other in asked]).mean(0)
