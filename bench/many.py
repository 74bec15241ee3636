"""Many mined subjects, all mandatory at once: what they touch together, what that costs others, and what is kept.

The first subjects come from --facts, so that excess knowledge can be measured; the rest are the names that mining ships
as controls. Facts about subjects that are never held are the neighbours, the same ones at every size. Each size is
measured with thresholds as mined and with thresholds tightened to --max-false-fire for the whole bank.
"""

import argparse
from pathlib import Path
from typing import Any

import common
import torch
from facts_table import choose

from kif_hf import attach
from kif_runtime import Capsule, CapsuleBank, KifError
from kif_runtime.evaluation.facts import Fact, answer_probabilities, load_facts, prior_probabilities
from kif_runtime.evaluation.firing import Firing, hooked
from kif_runtime.evaluation.run import fact_row, kept_summaries, neighbour_table, text_table
from kif_runtime.evaluation.text import TextSample, predicted, sample_text, window_batches, window_losses
from kif_runtime.mining.corpus import corpus


def options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--text", type=Path, required=True, help="running text")
    parser.add_argument("--tokens", type=int, default=20480, help="how many tokens of it (default: 20480)")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sizes", default="1,10,100,1000", help="how many subjects at once (default: 1,10,100,1000)")
    parser.add_argument("--erased", type=int, default=100, help="subjects of --facts to hold at most (default: 100)")
    parser.add_argument("--max-false-fire", type=float, default=1e-4)
    return parser.parse_args()


def sizes(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise KifError(f"--sizes {text!r} are not numbers over 0, as in 1,10,100")
    return found


def names(facts: list[Fact], erased: int, count: int, seed: int) -> list[str]:
    """`count` subjects: up to `erased` of the facts', then shipped names that no fact is about."""
    own = choose(facts, min(erased, count), seed)
    asked = {f.subject.casefold() for f in facts}
    others = [e.name for e in corpus().entities if e.name.casefold() not in asked]
    found = [*own, *dict.fromkeys(others)][:count]
    if len(found) < count:
        raise KifError(f"there are only {len(found)} subjects to mine; ask for a smaller size, or raise --erased")
    return found


class Together:
    """The bare model's figures once, and those under each bank."""

    def __init__(self, model: Any, tokenizer: Any, own: list[Fact], others: list[Fact], sample: TextSample) -> None:
        self.model, self.tokenizer, self.own, self.others, self.sample = model, tokenizer, own, others, sample
        self.before = answer_probabilities(model, tokenizer, [*own, *others], progress=common.progress("bare"))
        priors = prior_probabilities(model, tokenizer, own, progress=common.progress("priors"))
        self.priors = [p if p is not None else f.p_prior or 0.0 for p, f in zip(priors, own, strict=True)]
        self.losses = window_losses(model, sample.ids, progress=common.progress("bare"))

    def measure(self, held: list[common.Mined], max_false_fire: float | None) -> dict[str, Any]:
        capsules = [m.capsule for m in held]
        subjects = {m.subject for m in held}
        ids = [c.id for c in capsules]
        bank = CapsuleBank.for_capsules(capsules, mandatory=ids, max_false_fire=max_false_fire)
        own = [i for i, f in enumerate(self.own) if f.subject in subjects]
        asked = [*(self.own[i] for i in own), *self.others]
        with attach(self.model, [], bank=bank):
            after = answer_probabilities(self.model, self.tokenizer, asked, progress=common.progress("attached"))
        rows = [
            fact_row(self.own[i], self.before[i], p, self.priors[i])
            for i, p in zip(own, after[: len(own)], strict=True)
        ]
        kept = kept_summaries(rows)["kept"]
        neighbours = neighbour_table(self.others, self.before[len(self.own) :], after[len(own) :])
        return {
            "subjects": len(held),
            "max_false_fire": max_false_fire,
            "kept": kept,
            "neighbours": neighbours,
            "text": self._text(bank, ids, sorted(subjects)),
            "recall_lost": recall_lost(bank),
            "bytes": sum(c.nbytes for c in capsules),
            "bank_bytes": bank.nbytes,
            "signatures": sum(len(c.signatures) for c in capsules),
            "facts": rows,
        }

    def _text(self, bank: CapsuleBank, ids: list[str], subjects: list[str]) -> dict[str, Any]:
        """Losses with all applied, and tokens touched by any: in all, and in paragraphs that name none of them."""
        firing = Firing(bank, ids, apply=True)
        losses, touched = [], []
        tell = common.progress("text")
        with hooked(self.model, firing):
            for some in window_batches(self.sample.ids):
                losses += window_losses(self.model, some)
                touched.append(firing.hits.any(1).view(some.shape))
                tell(len(losses), len(self.sample.ids))
        fired, negative = torch.cat(touched), ~self.sample.naming(subjects)
        table = text_table(self.losses, losses, predicted(self.sample.ids))
        counts = {"tokens": fired.numel(), "touched": int(fired.sum())}
        return table | counts | {"false": int((fired & negative).sum()), "negatives": int(negative.sum())}


def recall_lost(bank: CapsuleBank) -> dict[str, float | None]:
    """Held-out recall that tightened thresholds cost, over signatures."""
    lost = [x for entry in bank.report().values() for x in entry["recall_lost"] if x is not None]
    return {"mean": common.mean(lost), "worst": max(lost, default=None)}


def check(capsules: list[Capsule]) -> None:
    if not capsules:
        raise KifError("no subject could be mined; see the messages above")


def main() -> None:
    args = options()
    wanted = sizes(args.sizes)
    facts = load_facts(args.facts)
    subjects = names(facts, args.erased, max(wanted), args.seed)
    model, tokenizer = common.load(args)
    sample = sample_text(tokenizer, common.read_text(args.text), window=args.window, tokens=args.tokens)
    mined = [m for m in common.Mine(model, tokenizer, args).all(subjects) if m.capsule]
    check([m.capsule for m in mined])
    held = {m.subject for m in mined}
    own = [f for f in facts if f.subject in held]
    others = [f for f in facts if f.subject not in set(subjects)]
    if not others:
        raise KifError("every subject of the facts would be held; lower --erased, so that some are left as neighbours")
    together = Together(model, tokenizer, own, others, sample)
    rows = []
    for size in wanted:
        for limit in (None, args.max_false_fire):
            rows.append(together.measure(mined[:size], limit))
            common.say(f"measured {rows[-1]['subjects']} subjects, max_false_fire {limit}")
            show(rows[-1:])  # each may take minutes: what is measured is told
            common.write_json(args.json, {"settings": {k: str(v) for k, v in vars(args).items()}, "rows": rows})
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    heads = [
        "touched",
        "false",
        "perplexity −1",
        "|Δp| others",
        "kept",
        "95 %",
        "facts",
        "recall lost",
        "worst",
        "bytes",
    ]
    lines = []
    for row in rows:
        text, kept, lost = row["text"], row["kept"], row["recall_lost"]
        label = f"{row['subjects']}, {'as mined' if row['max_false_fire'] is None else row['max_false_fire']}"
        side = [text["touched"] / text["tokens"], text["false"] / max(1, text["negatives"]), text["ratio"] - 1]
        known = [kept.get("mean"), common.interval(kept), kept["facts"]]
        lines.append([label, *side, row["neighbours"]["mean"], *known, lost["mean"], lost["worst"], row["bytes"]])
    common.show("subjects held, thresholds", ["", *heads], lines)


if __name__ == "__main__":
    common.run(main)
