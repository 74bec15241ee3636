"""Baked, no hook: knowledge kept, neighbours, perplexity, seconds, memory and bytes, over subjects of a file of facts.

    python bench/bake_table.py --facts FACTS --text TEXT --count 20                    one adapter for each subject
    python bench/bake_table.py --facts FACTS --text TEXT --count 20 --together         one adapter for all
    python bench/bake_table.py --facts FACTS --count 6 --objective all --relearn --four-bit

Subjects are drawn with --seed, so that settings can be chosen on some and reported on others. Facts are never baked
from: their prompts are none of the corpus's templates.
"""

import argparse
import json
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import torch

from kif_runtime import Capsule
from kif_runtime.bake import bake
from kif_runtime.bake.continuing import Earlier
from kif_runtime.bake.durability import four_bit
from kif_runtime.bake.objectives import OBJECTIVES
from kif_runtime.blocks import decoder_blocks
from kif_runtime.evaluation import Fact, evaluate, load_facts
from kif_runtime.evaluation.facts import answer_probabilities
from kif_runtime.evaluation.run import fact_row, kept_summaries

RELEARN_STEPS, RELEARN_RATE, RELEARN_ROWS = 25, 1e-5, 4
COLUMNS = ("objective", "subjects", "kept", "interval", "|Δp| neighbours", "perplexity", "relearned", "4 bits",
           "s each", "CPU s each", "GB", "MB")  # fmt: skip


def main() -> None:
    options = arguments()
    model, tokenizer = common.load(options)
    facts = load_facts(options.facts)
    names = list(dict.fromkeys(fact.subject for fact in facts))
    random.Random(options.seed).shuffle(names)
    mined = common.Mine(model, tokenizer, options).all(names[: options.count])
    capsules = {m.subject: m.capsule for m in mined if m.capsule is not None}
    text = common.read_text(options.text) if options.text else None
    others = random.Random(options.seed).sample([f for f in facts if f.subject not in capsules], options.neighbours)
    chosen = list(OBJECTIVES) if options.objective == "all" else [options.objective]
    rows = []
    for objective in chosen:
        groups = [list(capsules)] if options.together else [[name] for name in capsules]
        found = []
        for group in groups:
            about = [f for f in facts if f.subject in group]
            found.append(
                one(model, tokenizer, {n: capsules[n] for n in group}, about, others, text, objective, options)
            )
            common.say(f"{objective}: {len(found)} of {len(groups)}")
        rows.append(summary(objective, len(capsules), found))
    common.show("Baked, no hook", COLUMNS, [[row[c] for c in COLUMNS] for row in rows])
    common.write_json(options.json, {"rows": rows, "options": {k: str(v) for k, v in vars(options).items()}})


def arguments() -> argparse.Namespace:
    options = common.parser(__doc__)
    options.add_argument("--count", type=int, default=20, help="subjects (default: 20)")
    options.add_argument("--neighbours", type=int, default=60, help="facts about others (default: 60)")
    options.add_argument("--text", type=Path, help="running text, for perplexity")
    options.add_argument("--together", action="store_true", help="one adapter for all subjects")
    options.add_argument("--objective", default="capsule", help="a name, or all")
    options.add_argument("--settings", type=json.loads, default={}, metavar="JSON", help="of the training")
    options.add_argument("--durability", action="append", default=[], help="a durability term")
    options.add_argument("--relearn", action="store_true", help=f"also after {RELEARN_STEPS} steps on the very facts")
    options.add_argument("--four-bit", action="store_true", help="also with all projections rounded to 4 bits")
    return options.parse_args()


def one(
    model: Any, tokenizer: Any, capsules: dict[str, Capsule], facts: Sequence[Fact], others: Sequence[Fact],
    text: str | None, objective: str, options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Bake one adapter and measure it, alone and under attack."""
    folder = Path(tempfile.mkdtemp(prefix="kif-bench-"))
    try:
        begun, cpu = time.perf_counter(), time.process_time()
        with torch.enable_grad():
            made = bake(
                model, tokenizer, list(capsules.values()), folder / "adapter", objective=objective,
                names={c.id: [n] for n, c in capsules.items()}, settings=options.settings,
                durability=options.durability, seed=options.seed,
            )  # fmt: skip
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        adapter = Earlier(folder / "adapter")
    finally:
        shutil.rmtree(folder)
    table = evaluate(model, tokenizer, lambda: adapter.at_work(model), facts=facts, neighbours=others, text=text)
    result = {"table": table, "seconds": seconds, "cpu": cpu, "bytes": made.nbytes, "subjects": len(capsules)}
    with adapter.at_work(model):
        if options.relearn:
            with relearned(model, tokenizer, facts):
                result["relearned"] = asked_again(model, tokenizer, facts, table)
        if options.four_bit:
            with in_four_bits(model):
                result["four_bit"] = asked_again(model, tokenizer, facts, table)
    return result


def asked_again(model: Any, tokenizer: Any, facts: Sequence[Fact], table: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts' rows with what the model answers now."""
    after = answer_probabilities(model, tokenizer, facts)
    return [
        fact_row(fact, row["before"], p, row["prior"])
        for fact, row, p in zip(facts, table["facts"], after, strict=True)
    ]


@contextmanager
def relearned(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> Iterator[None]:
    """Inside, all weights have been tuned on the facts themselves, for RELEARN_STEPS steps of RELEARN_ROWS texts."""
    kept = [p.detach().clone() for p in model.parameters()]
    rng = random.Random(0)
    with torch.enable_grad():
        optimiser = torch.optim.AdamW(model.parameters(), lr=RELEARN_RATE)
        for _ in range(RELEARN_STEPS):
            some = [rng.choice(facts) for _ in range(RELEARN_ROWS)]
            batch = tokenizer([f"{f.prompt} {f.answer}" for f in some], return_tensors="pt", padding=True,
                              padding_side="right")  # fmt: skip
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            model(**batch, labels=labels).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    try:
        yield
    finally:
        for parameter, values in zip(model.parameters(), kept, strict=True):
            parameter.data.copy_(values)


@contextmanager
def in_four_bits(model: Any) -> Iterator[None]:
    """Inside, the blocks' projections are rounded to 4 bits, the adapter merged before."""
    weights = [m.weight for m in decoder_blocks(model).modules() if isinstance(m, torch.nn.Linear)]
    kept = [w.detach().clone() for w in weights]
    for weight in weights:
        weight.data.copy_(four_bit(weight))
    try:
        yield
    finally:
        for weight, values in zip(weights, kept, strict=True):
            weight.data.copy_(values)


def summary(objective: str, count: int, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table."""
    kept = kept_summaries([row for f in found for row in f["table"]["facts"]])["kept"]

    def later(name: str) -> float | None:
        rows = [row for f in found for row in f.get(name, ())]
        return kept_summaries(rows)["kept"].get("mean") if rows else None

    ratios = [f["table"]["text"]["ratio"] for f in found if f["table"]["text"]]
    values = (
        objective, count, kept.get("mean"), common.interval(kept),
        common.mean(f["table"]["neighbours"]["mean"] for f in found),
        None if not ratios else f"{100 * (common.mean(ratios) - 1):+.2f} %",
        later("relearned"), later("four_bit"),
        sum(f["seconds"] for f in found) / count, sum(f["cpu"] for f in found) / count,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, sum(f["bytes"] for f in found) / len(found) / 1e6,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


if __name__ == "__main__":
    common.run(main)
