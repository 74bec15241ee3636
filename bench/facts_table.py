"""How much of what a model knows about each subject is left once its capsule is attached, and what else moved.

Each subject's capsule is mined, attached alone and measured on the subject's facts (none of which mining saw), on the
facts of all other subjects, and on running text. Subjects that are done are kept in a journal: killed and started
again, the script goes on where it was.

Prompts and windows on which a capsule does not fire are left exactly as they were, so only those on which it fires at
the bare states are computed again; the others count with a change of 0.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import facts_report
import torch

from kif_hf import attach
from kif_runtime import KifError
from kif_runtime.evaluation.facts import Fact, answer_probabilities, encode, load_facts, padded, prior_probabilities
from kif_runtime.evaluation.firing import fires_on, watching
from kif_runtime.evaluation.kinds import kinds_of, name_states, nearest
from kif_runtime.evaluation.run import fact_row, text_table
from kif_runtime.evaluation.text import TextSample, predicted, sample_text, window_batches, window_losses

FORMS = {"bare": ["bare"], "chat": ["chat"], "both": ["bare", "chat"]}


def options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--text", type=Path, help="running text for perplexity and false fires")
    parser.add_argument("--tokens", type=int, default=20480, help="how many tokens of it (default: 20480)")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--subjects", type=int, help="how many (default: all), one of every relation first")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this subject; may be repeated")
    parser.add_argument("--except", dest="leave_out", type=Path, metavar="FILE", help="leave out, one name a line")
    parser.add_argument("--form", choices=FORMS, default="bare", help="how facts are asked (default: bare)")
    parser.add_argument("--nearest", type=int, default=5, help="how many nearest neighbours of the same kind")
    return parser.parse_args()


def choose(facts: Sequence[Fact], count: int | None, seed: int, leave_out: set[str] = frozenset()) -> list[str]:
    """`count` subjects: one for every relation as long as they last, then any; the order is shuffled by the seed."""
    by_subject: dict[str, str] = {}
    for fact in facts:
        if fact.subject not in leave_out:
            by_subject.setdefault(fact.subject, fact.relation)
    names = sorted(by_subject)
    random.Random(seed).shuffle(names)
    first = list({by_subject[name]: name for name in reversed(names)}.values())
    return [*first, *(name for name in names if name not in set(first))][:count]


class Table:
    """The model, the facts and the text, and what is measured against them for one capsule after another."""

    def __init__(self, model: Any, tokenizer: Any, facts: list[Fact], sample: TextSample | None, args: Any) -> None:
        self.model, self.tokenizer, self.facts, self.sample = model, tokenizer, facts, sample
        self.forms = FORMS[args.form]
        self.kinds = kinds_of(facts)
        self.names = list(self.kinds)
        self.count = args.nearest
        self.states = name_states(model, tokenizer, self.names)
        self.losses: list[float] = []
        self.before: dict[int, float] = {}

    def screen(self, found: Sequence[common.Mined]) -> dict[str, dict[str, Any]]:
        """Per subject: indices of the facts and windows that its capsule touches, and the tokens on which it fires."""
        capsules = [m.capsule for m in found]
        touched: dict[str, dict[str, Any]] = {m.subject: {"facts": [], "windows": [], "false": 0} for m in found}
        tell = common.progress("screening")
        with watching(self.model, capsules) as firing:
            prompts = encode(self.tokenizer, self.facts)
            order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
            for start in range(0, len(order), 32):
                some = order[start : start + 32]
                hit = fires_on(self.model, firing, *padded([prompts[i] for i in some])).any(1)
                for row, column in hit.nonzero().tolist():
                    touched[found[column].subject]["facts"].append(some[row])
                tell(start, len(order), "facts")
            if self.sample is not None:
                self._screen_text(firing, found, touched, tell)
        return touched

    def _screen_text(self, firing: Any, found: Sequence[common.Mined], touched: dict[str, Any], tell: Any) -> None:
        naming = {m.subject: self.sample.naming([m.subject, *m.capsule.aliases]) for m in found}
        start = 0
        for some in window_batches(self.sample.ids):
            hits = fires_on(self.model, firing, some)
            for column in hits.any(0).any(0).nonzero()[:, 0].tolist():
                entry, own = touched[found[column].subject], hits[..., column]
                entry["windows"] += [start + i for i in own.any(1).nonzero()[:, 0].tolist()]
                entry["false"] += int((own & ~naming[found[column].subject][start : start + len(some)]).sum())
            start += len(some)
            tell(start, len(self.sample.ids), "windows")
        for m in found:
            touched[m.subject]["negatives"] = int((~naming[m.subject]).sum())

    def measure(self, mined: common.Mined, touched: dict[str, Any]) -> dict[str, Any]:
        """Everything about one subject, JSON-able."""
        own = [f for f in self.facts if f.subject == mined.subject]
        others = [i for i in touched["facts"] if self.facts[i].subject != mined.subject]
        bare = {form: self._bare(own, form) for form in self.forms}
        self._before(others)
        with attach(self.model, [mined.capsule]) as kif:
            after = {form: answer_probabilities(self.model, self.tokenizer, own, form=form) for form in self.forms}
            moved = answer_probabilities(self.model, self.tokenizer, [self.facts[i] for i in others])
            kif.reset()
            losses = self._after(touched["windows"])
            fired = sum(kif.fired.values())
        rows = [
            fact_row(fact, b, a, p, form) | {"form": form}
            for form in self.forms
            for fact, b, p, a in zip(own, *bare[form], after[form], strict=True)
        ]
        calibration = mined.capsule.calibration
        return {
            "subject": mined.subject,
            "kind": self.kinds[mined.subject],
            "facts": rows,
            "neighbours": self._neighbours(mined.subject, others, moved),
            "text": self._text(touched, losses, fired),
            "mining": {
                "seconds": mined.seconds,
                "bytes": mined.capsule.nbytes,
                "signatures": len(mined.capsule.signatures),
                "sites": mined.capsule.sites,
                "rank": sum(s.rank for s in mined.capsule.signatures),
                "recall": calibration.get("recall"),
                "warnings": calibration.get("warnings", []),
            },
        }

    def _bare(self, own: list[Fact], form: str) -> tuple[list[float], list[float]]:
        before = answer_probabilities(self.model, self.tokenizer, own, form=form)
        priors = prior_probabilities(self.model, self.tokenizer, own, form=form)
        return before, [p if p is not None else f.p_prior or 0.0 for p, f in zip(priors, own, strict=True)]

    def _before(self, indices: list[int]) -> None:
        missing = [i for i in indices if i not in self.before]
        values = answer_probabilities(self.model, self.tokenizer, [self.facts[i] for i in missing])
        self.before.update(zip(missing, values, strict=True))

    def read_text(self, journal: common.Journal) -> None:
        """The bare model's losses per window, from the journal where they were measured before."""
        if self.sample is not None:
            if "losses" not in journal.rows:
                found = window_losses(self.model, self.sample.ids, progress=common.progress("perplexity"))
                journal.append("losses", {"losses": found})
            self.losses = journal.rows["losses"]["losses"]

    def _after(self, windows: list[int]) -> list[float]:
        return window_losses(self.model, self.sample.ids[windows]) if windows else []

    def _neighbours(self, subject: str, others: list[int], moved: list[float]) -> dict[str, Any]:
        """Mean |Δp| over the facts of all other subjects, and over those of the nearest of the same kind."""
        change = {i: abs(p - self.before[i]) for i, p in zip(others, moved, strict=True)}
        close = nearest(subject, self.names, self.states, self.kinds, self.count)
        everyone = [i for i, f in enumerate(self.facts) if f.subject != subject]
        near = [i for i in everyone if self.facts[i].subject in close]
        worst = max(change, key=change.__getitem__, default=None)
        return {
            "facts": len(everyone),
            "touched": len(others),
            "mean": sum(change.values()) / len(everyone) if everyone else None,
            "nearest": close,
            "nearest_facts": len(near),
            "nearest_mean": sum(change.get(i, 0.0) for i in near) / len(near) if near else None,
            "worst": None if worst is None else {"prompt": self.facts[worst].prompt, "change": change[worst]},
        }

    def _text(self, touched: dict[str, Any], losses: list[float], fired: int) -> dict[str, Any] | None:
        if self.sample is None:
            return None
        after = list(self.losses)
        for window, loss in zip(touched["windows"], losses, strict=True):
            after[window] = loss
        table = text_table(self.losses, after, predicted(self.sample.ids))
        counts = {"tokens": self.sample.ids.numel(), "touched": fired, "false": touched["false"]}
        return table | counts | {"negatives": touched["negatives"]}


def main() -> None:
    args = options()
    facts = load_facts(args.facts)
    leave_out = set(args.leave_out.read_text().splitlines()) if args.leave_out else set()
    subjects = args.only or choose(facts, args.subjects, args.seed, leave_out)
    if unknown := set(subjects) - {f.subject for f in facts}:
        raise KifError(f"{args.facts} holds no fact about {sorted(unknown)[0]!r}; check --only")
    model, tokenizer = common.load(args)
    text = common.read_text(args.text) if args.text else None
    sample = None if text is None else sample_text(tokenizer, text, window=args.window, tokens=args.tokens)
    mine = common.Mine(model, tokenizer, args)
    found = mine.all(subjects)
    settings = [[f.__dict__ for f in facts], None if sample is None else sample.ids.tolist(), args.form, args.nearest]
    journal = common.Journal(mine.folder / f"facts-{common.digest(settings)}.jsonl")
    rows = measured(lambda: Table(model, tokenizer, facts, sample, args), [m for m in found if m.capsule], journal)
    failed = [{"subject": m.subject, "error": m.error} for m in found if m.error]
    result = {"settings": {k: str(v) for k, v in vars(args).items()}, "failed": failed} | facts_report.aggregate(rows)
    common.write_json(args.json, result | {"subjects": rows})
    facts_report.show(rows, result)


def measured(make: Callable[[], Table], found: list[common.Mined], journal: common.Journal) -> list[dict[str, Any]]:
    """A row per subject, from the journal where this very capsule was measured before."""
    keys = {m.subject: m.capsule.digest for m in found}
    pending = [m for m in found if keys[m.subject] not in journal.rows]
    if pending:
        table = make()
        touched = table.screen(pending)
        table.read_text(journal)
    for number, m in enumerate(pending, 1):
        journal.append(keys[m.subject], table.measure(m, touched[m.subject]))
        common.say(f"measured {number} of {len(pending)}: {m.subject}")
    return [journal.rows[keys[m.subject]] for m in found]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    common.run(main)
