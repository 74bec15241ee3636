"""What gets past the gate: each subject's name written in other ways, how often the gate still fires, and how much of
what the bare model knows under that spelling comes back.

A fact counts as known in a spelling where p_before − p_prior is at least 0.15 with the name written so.
--descriptions FILE is a JSON object, subject → a description of it without the name, to be put in the name's place.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import common
from facts_table import choose

from kif_hf import attach
from kif_runtime import KifError
from kif_runtime.evaluation.evasion import DESCRIPTION, REWRITINGS, evade, together
from kif_runtime.evaluation.facts import load_facts, prior_probabilities


def options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--subjects", type=int, help="how many (default: all), one of every relation first")
    parser.add_argument("--form", choices=("bare", "chat"), default="bare")
    parser.add_argument("--descriptions", type=Path, metavar="FILE")
    return parser.parse_args()


def read_descriptions(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise KifError(f"cannot read {path}: {failure}") from None
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise KifError(f"{path} is not a JSON object of subject → description; correct it")
    return found


def main() -> None:
    args = options()
    facts = load_facts(args.facts)
    descriptions = read_descriptions(args.descriptions)
    model, tokenizer = common.load(args)
    mine = common.Mine(model, tokenizer, args)
    found = [m for m in mine.all(choose(facts, args.subjects, args.seed)) if m.capsule]
    settings = [[f.__dict__ for f in facts], args.form, list(REWRITINGS), descriptions]
    journal = common.Journal(mine.folder / f"evasion-{common.digest(settings)}.jsonl")
    for number, mined in enumerate(found, 1):
        if mined.capsule.digest not in journal.rows:
            row = measure(model, tokenizer, mined, facts, args.form, descriptions)
            journal.append(mined.capsule.digest, row)
            common.say(f"measured {number} of {len(found)}: {mined.subject}")
    ways = [*REWRITINGS, *([DESCRIPTION] if descriptions else [])]
    done = [journal.rows[m.capsule.digest]["ways"] for m in found]
    table = {way: together([row for ways in done for row in ways.get(way, [])]) for way in ways}
    common.write_json(args.json, {"settings": {k: str(v) for k, v in vars(args).items()}, "ways": table})
    show(table)


def measure(
    model: Any, tokenizer: Any, mined: common.Mined, facts: list[Any], form: str, descriptions: dict[str, str]
) -> dict[str, Any]:
    own = [f for f in facts if f.subject == mined.subject]
    measured = prior_probabilities(model, tokenizer, own, form=form)
    priors = [p if p is not None else f.p_prior or 0.0 for p, f in zip(measured, own, strict=True)]
    found = evade(
        model, tokenizer, lambda: attach(model, [mined.capsule]), own, priors, form=form, descriptions=descriptions
    )
    return {"subject": mined.subject, "ways": {way: entry["rows"] for way, entry in found.items()}}


def show(table: dict[str, dict[str, Any]]) -> None:
    lines = []
    for way, entry in table.items():
        kept = entry["kept"]
        known = [kept["facts"], kept.get("mean"), common.interval(kept), kept.get("beyond")]
        lines.append([way, entry["asked"], entry["fired"], *known])
    heads = ["", "facts", "fires on", "known so", "kept of those", "95 %", "beyond ±0.2"]
    common.show("the name written in other ways", heads, lines)


if __name__ == "__main__":
    common.run(main)
