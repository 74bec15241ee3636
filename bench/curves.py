"""How the knowledge kept and the false fires move with strength, threshold and rank, over capsules mined before.

Every capsule is measured alone, as in facts_table.py, once as mined and once for each change made to all its
signatures: another strength, another threshold (the bias shifted, in units in which the controls' mean scores 0 and the
subject's scores 1), only the neutral direction in place of the whole basis, only the last token's signature.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch
from facts_table import choose

from kif_hf import attach
from kif_runtime import Capsule, KifError, Signature
from kif_runtime.evaluation.facts import Fact, answer_probabilities, load_facts, prior_probabilities
from kif_runtime.evaluation.firing import fires_on, watching
from kif_runtime.evaluation.run import fact_row, kept_summaries
from kif_runtime.evaluation.text import TextSample, sample_text, window_batches

STRENGTHS = (0.7, 0.85)
RAISED = (-0.2, -0.1, 0.1, 0.2)
Change = Callable[[Capsule], Capsule]


def each(change: Callable[[Signature], Signature]) -> Change:
    return lambda capsule: replace(capsule, signatures=tuple(change(s) for s in capsule.signatures))


def weaker(strength: float) -> Change:
    return each(lambda s: replace(s, strength=torch.tensor(strength)))


def raised(by: float) -> Change:
    return each(lambda s: replace(s, bias=s.bias - by))


def neutral_only(signature: Signature) -> Signature:
    return replace(signature, basis=signature.basis[:1], target=signature.target[:1])


def last_only(capsule: Capsule) -> Capsule:
    return replace(capsule, signatures=tuple(s for s in capsule.signatures if s.role == "last"))


def changes() -> dict[str, Change]:
    found: dict[str, Change] = {"as mined": lambda capsule: capsule}
    found |= {f"strength {value}": weaker(value) for value in STRENGTHS}
    found |= {f"threshold {by:+}": raised(by) for by in RAISED}
    return found | {"rank 1": each(neutral_only), "last token only": last_only}


def kept(model: Any, tokenizer: Any, held: list[common.Mined], facts: list[Fact], bare: list[tuple[float, float]],
         change: Change) -> dict[str, Any]:  # fmt: skip
    """The summary of `kept` over the facts of all subjects, each with its own changed capsule attached alone."""
    rows = []
    for mined in held:
        own = [i for i, f in enumerate(facts) if f.subject == mined.subject]
        with attach(model, [change(mined.capsule)]):
            after = answer_probabilities(model, tokenizer, [facts[i] for i in own])
        rows += [fact_row(facts[i], bare[i][0], a, bare[i][1]) for i, a in zip(own, after, strict=True)]
    return kept_summaries(rows)["kept"]


def false_fires(model: Any, held: list[common.Mined], sample: TextSample, change: Change) -> list[float]:
    """Per capsule, the share of tokens on which it fires in paragraphs that do not name its subject."""
    counted = torch.zeros(len(held))
    silent = torch.stack([~sample.naming([m.subject]) for m in held], -1)
    start = 0
    with watching(model, [change(m.capsule) for m in held]) as firing:
        for some in window_batches(sample.ids):
            hits = fires_on(model, firing, some)
            counted += (hits & silent[start : start + len(some)]).sum((0, 1))
            start += len(some)
    return (counted / silent.sum((0, 1))).tolist()


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--text", type=Path, required=True, help="running text, for false fires")
    parser.add_argument("--tokens", type=int, default=20480, help="how many tokens of it (default: 20480)")
    parser.add_argument("--subjects", type=int, help="how many (default: all), one of every relation first")
    parser.add_argument("--except", dest="leave_out", type=Path, metavar="FILE", help="leave out, one name a line")
    args = parser.parse_args()
    facts = load_facts(args.facts)
    leave_out = set(args.leave_out.read_text().splitlines()) if args.leave_out else set()
    model, tokenizer = common.load(args)
    sample = sample_text(tokenizer, common.read_text(args.text), window=512, tokens=args.tokens)
    subjects = choose(facts, args.subjects, args.seed, leave_out)
    held = [m for m in common.Mine(model, tokenizer, args).all(subjects) if m.capsule]
    if not held:
        raise KifError("no subject could be mined; see the messages above")
    facts = [f for f in facts if f.subject in {m.subject for m in held}]
    before = answer_probabilities(model, tokenizer, facts)
    priors = prior_probabilities(model, tokenizer, facts)
    bare = [(b, p if p is not None else f.p_prior or 0.0) for b, p, f in zip(before, priors, facts, strict=True)]
    rows = {}
    for name, change in changes().items():
        fires = false_fires(model, held, sample, change)
        found = {"false": common.mean(fires), "over 1e-4": sum(f > 1e-4 for f in fires)}
        rows[name] = {"kept": kept(model, tokenizer, held, facts, bare, change)} | found
        common.say(f"measured: {name}")
    common.write_json(args.json, {"settings": {k: str(v) for k, v in vars(args).items()}, "rows": rows})
    lines = [
        [name, row["kept"]["mean"], common.interval(row["kept"]), row["kept"]["beyond"], row["false"], row["over 1e-4"]]
        for name, row in rows.items()
    ]
    heads = ["", "kept", "95 %", "beyond ±0.2", "false fires per token", "subjects over 1e-4"]
    common.show(f"{len(held)} subjects, {len(facts)} facts", heads, lines)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    common.run(main)
