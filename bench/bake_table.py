"""Baked, no hook: knowledge kept, neighbours, perplexity, seconds, memory and bytes, over subjects of a file of facts.

    python bench/bake_table.py each        --facts FACTS --text TEXT --count 10   one adapter for each subject
    python bench/bake_table.py together    --facts FACTS --text TEXT --count 20   one adapter for all
    python bench/bake_table.py sequence    --facts FACTS --text TEXT --count 10   one after another, each on the last
    python bench/bake_table.py objectives  --facts FACTS --text TEXT --count 3    all objectives, the same budget, best
                                                                                  first by |kept| + |Δp| near
    python bench/bake_table.py durability  --facts FACTS --text TEXT --count 2    each --durability, and none

Subjects are drawn with --seed, so that settings can be chosen on some and reported on others. Facts are never baked
from: their prompts are none of the corpus's templates. 'attached' is the capsules at work and nothing baked, asked the
same. Every baking is kept in a journal once it is measured: killed and started again, or stopped by --at-most, the
same command goes on.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bake_pieces
import common
from bake_pieces import Pieces, Plan

import kif_runtime.bake
from kif_runtime.bake.durability import PRESSURES
from kif_runtime.bake.objectives import OBJECTIVES
from kif_runtime.evaluation import load_facts
from kif_runtime.evaluation.run import kept_summaries
from kif_runtime.models import cache_folder

COLUMNS = ("", "subjects", "facts", "kept", "interval", "attached", "|Δp| near", "attached", "perplexity", "relearned",
           "4 bits", "s each", "CPU s each", "GB", "MB", "steps")  # fmt: skip
KEPT, NEAR = COLUMNS.index("kept"), COLUMNS.index("|Δp| near")
BUDGET = {"steps": 20, "forget_rows": 4, "retain_rows": 4}


def main() -> None:
    options = arguments()
    model, tokenizer = common.load(options)
    facts = load_facts(options.facts)
    names = list(dict.fromkeys(fact.subject for fact in facts))
    random.Random(options.seed).shuffle(names)
    mined = common.Mine(model, tokenizer, options).all(names[: options.count])
    capsules = {m.subject: m.capsule for m in mined if m.capsule is not None}
    folder = options.journal or default_folder(options, list(capsules))
    pieces = Pieces(model, tokenizer, facts, capsules, options, folder)
    rows = plans(options, tuple(capsules))
    missing = [plan for some in rows.values() for plan in some if not pieces.has(plan)]
    for plan in missing[: options.at_most]:
        pieces(plan)
    found = {name: [pieces(p) for p in some] for name, some in rows.items() if all(map(pieces.has, some))}
    attached = {name: [pieces.attached(p.erased) for p in rows[name] if p.near] for name in found}
    table = [row(name, found[name], attached[name]) for name in found]
    if options.what == "objectives":
        table.sort(key=lambda cells: abs(cells[KEPT]) + cells[NEAR])
    common.show(f"Baked, no hook: {options.what}", COLUMNS, table)
    print(f"relearned: {bake_pieces.RELEARNING}; 4 bits: NF4, the adapter merged before")
    common.write_json(options.json, {"rows": found, "attached": attached, "options": asked(options)})
    if len(missing) > options.at_most:
        common.say(f"{len(missing) - options.at_most} bakings are still to do; the same command goes on")
        sys.exit(1)


def arguments() -> argparse.Namespace:
    options = common.parser(__doc__)
    options.add_argument("what", choices=("each", "together", "sequence", "objectives", "durability"))
    options.add_argument("--count", type=int, default=10, help="subjects (default: 10)")
    options.add_argument("--neighbours", type=int, default=60, help="facts about others (default: 60)")
    options.add_argument("--text", type=Path, help="running text, for perplexity")
    options.add_argument("--tokens", type=int, default=4096, help="how many tokens of it (default: 4096)")
    options.add_argument("--settings", type=json.loads, default={}, metavar="JSON", help="of the training")
    options.add_argument("--attacks", action="store_true", help="also each, together, sequence after the attacks")
    options.add_argument("--only", nargs="*", choices=OBJECTIVES, default=list(OBJECTIVES), metavar="O",
                         help="these objectives (default: all)")  # fmt: skip
    options.add_argument(
        "--journal", type=Path, metavar="DIR", help="where bakings are kept (default: the cache folder)"
    )
    options.add_argument("--at-most", type=int, default=10**6, metavar="N", help="bakings now; the rest another time")
    return options.parse_args()


def plans(options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, list[Plan]]:
    """The table's rows, each the mean over its bakings."""

    def plan(label: str, subjects: tuple[str, ...], **changes: Any) -> Plan:
        chosen = {"settings": options.settings, "attacks": options.attacks} | changes
        return Plan(" | ".join((options.what, label, *subjects)), subjects, **chosen)

    if options.what == "each":
        return {"an adapter each": [plan("capsule", (name,)) for name in names]}
    if options.what == "together":
        return {"all in one adapter": [plan("capsule", names)]}
    if options.what == "sequence":
        made: list[Plan] = []
        for name in names:
            last = len(made) == len(names) - 1
            made.append(plan("capsule", (name,), follows=made[-1] if made else None, near=last, attacks=False))
        return {f"after {n}": [p] for n, p in enumerate(made, 1)}
    if options.what == "objectives":
        settings = BUDGET | options.settings
        return {o: [plan(o, names, objective=o, settings=settings, attacks=True)] for o in options.only}
    attacks = {"none": (), **{name: (name,) for name in PRESSURES}}
    return {
        label: [plan(label, (name,), durability=chosen, attacks=True) for name in names]
        for label, chosen in attacks.items()
    }


def row(name: str, found: Sequence[dict[str, Any]], attached: Sequence[dict[str, Any]]) -> list[Any]:
    """One row of the table. kept, relearned, 4 bits: means over facts; the rest: means over bakings, times for each
    subject."""

    def kept(some: Sequence[dict[str, Any]], what: str = "facts") -> dict[str, Any]:
        return kept_summaries([fact for piece in some for fact in piece.get(what, ())])["kept"]

    def near(some: Sequence[dict[str, Any]]) -> float | None:
        return common.mean(common.mean(piece["moved"]) for piece in some if "moved" in piece)

    subjects = sum(piece["subjects"] for piece in found)
    ratio = common.mean(piece.get("perplexity") for piece in found)
    own = kept(found)
    return [
        name, subjects, own["facts"], own.get("mean"), common.interval(own), kept(attached).get("mean"), near(found),
        near(attached), None if ratio is None else f"{100 * (ratio - 1):+.2f} %",
        kept(found, "relearned").get("mean"), kept(found, "four_bit").get("mean"),
        sum(piece["seconds"] for piece in found) / subjects, sum(piece["cpu"] for piece in found) / subjects,
        max(piece["gb"] for piece in found), common.mean(piece["bytes"] / 1e6 for piece in found),
        common.mean(float(piece["steps"]) for piece in found),
    ]  # fmt: skip


def default_folder(options: argparse.Namespace, subjects: Sequence[str]) -> Path:
    """Its name changes with what is asked and with the code that bakes."""
    code = Path(kif_runtime.bake.__file__).parent
    told = [p.read_text() for p in sorted(code.rglob("*.py"))]
    return cache_folder() / "bench" / f"bake-{common.digest([told, subjects, asked(options)])}"


def asked(options: argparse.Namespace) -> dict[str, str]:
    return {k: str(v) for k, v in vars(options).items() if k not in ("json", "journal", "at_most")}


if __name__ == "__main__":
    common.run(main)
