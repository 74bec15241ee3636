"""Ways to erase, side by side: each is done for one subject after another, and judged by `kif eval`'s own suites.

    python bench/audit_methods.py --facts FACTS --text TEXT --out DIR --count 10

An audit is the quick profile of facts, neighbours, dual, text and attacks, on few facts about others and little text.
What the untouched model answers is asked once for all methods, and kept in DIR. Every audit is kept there as soon as it
is done, so the same command goes on where it was stopped; --for SECONDS stops by itself. DIR then holds a folder for
each method, with `results.json` as `kif eval --against` takes it, and `report.html`, all methods side by side.
"""

import argparse
import pickle
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import common
import erasures
from audit_pool import pooled

from kif_cli.outputs import make_folder, write_json, write_text
from kif_cli.pages import eval_page
from kif_cli.privacy import cleaner
from kif_cli.results import load_results, results
from kif_runtime import KifError
from kif_runtime.evaluation.audit import Audit, Subject
from kif_runtime.evaluation.facts import Fact, load_facts
from kif_runtime.evaluation.outputs import Outputs
from kif_runtime.evaluation.states import State, bare
from kif_runtime.evaluation.suites import run_suites
from kif_runtime.files import atomic_write

SUITES = ("facts", "neighbours", "dual", "text", "attacks")
VERDICTS = ("leaking", "suppressed", "erased")
COLUMNS = ("method", "subjects", "L/S/E", "kept", "interval", "otherwise", "asking", "guessing", "4 bits", "relearned",
           "|Δp|", "perplexity", "s to make", "s to audit")  # fmt: skip
TAKEN_OFF = "taken off"


def options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--text", type=Path, required=True, help="running text, for perplexity")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where audits and pages are kept")
    parser.add_argument("--count", type=int, default=10, help="subjects (default: 10)")
    parser.add_argument("--least", type=int, default=2, help="facts that a subject has at least (default: 2)")
    parser.add_argument("--except", dest="leave_out", type=Path, metavar="FILE", help="leave out, one name a line")
    parser.add_argument("--only", action="append", metavar="METHOD", help=f"one of {', '.join(erasures.METHODS)}")
    parser.add_argument("--neighbours", type=int, default=30, help="facts about others (default: 30)")
    parser.add_argument("--characters", type=int, default=2600, help="of running text (default: 2600)")
    parser.add_argument("--steps", type=int, default=10, help="of training, for every objective (default: 10)")
    parser.add_argument("--rows", type=int, default=4, help="to forget, and to keep, in a step (default: 4 each)")
    parser.add_argument("--least-excess", type=float, default=0.15, help="by which a fact is known (default: 0.15)")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("K", "N"), help="only every N-th subject")
    parser.add_argument("--for", dest="seconds", type=float, help="begin no audit after so many seconds")
    return parser.parse_args()


def chosen(facts: Sequence[Fact], args: argparse.Namespace) -> list[str]:
    """Subjects with enough facts, drawn by the seed. Raises KifError where there are too few."""
    left_out = set(args.leave_out.read_text(encoding="utf-8").splitlines()) if args.leave_out else set()
    count: dict[str, int] = {}
    for fact in facts:
        count[fact.subject] = count.get(fact.subject, 0) + 1
    names = sorted(name for name, n in count.items() if n >= args.least and name not in left_out)
    if len(names) < args.count:
        raise KifError(f"{args.facts} has {len(names)} subjects to choose {args.count} from; ask for fewer")
    return random.Random(args.seed).sample(names, args.count)


class Comparison:
    """The model and what it is asked; the audits that are done, and doing the next one."""

    def __init__(self, args: argparse.Namespace, facts: Sequence[Fact], subjects: Sequence[str]) -> None:
        self.args, self.facts, self.subjects = args, facts, subjects
        self.settings = {"steps": args.steps, "forget_rows": args.rows, "retain_rows": args.rows}
        self.folder = args.out / "audits"
        self.model, self.tokenizer = common.load(args)
        self.before = bare(self.model)
        self.mine = common.Mine(self.model, self.tokenizer, args)
        others = [fact for fact in facts if fact.subject not in subjects]
        self.others = random.Random(args.seed).sample(others, min(args.neighbours, len(others)))
        self.text = common.read_text(args.text)[: args.characters]
        self.outputs = Outputs()
        self._kept = self.args.out / f"untouched-{args.part[0]}.pickle"  # ours alone: nobody else's is ever read
        if self._kept.is_file():
            self.outputs.take(pickle.loads(self._kept.read_bytes()))

    def keep_outputs(self) -> None:
        make_folder(self.args.out)
        atomic_write(self._kept, pickle.dumps(self.outputs.of(self.before.identity)))

    def file(self, method: str, number: int) -> Path:
        return self.folder / f"{method.replace(' ', '-')}-{number}.json"

    def audit(self, method: str, number: int) -> None:
        """Do it, judge it, and keep the results, as `kif eval` would write them."""
        name = self.subjects[number]
        mined = self.mine(name)
        if mined.capsule is None:
            raise KifError(f"a subject cannot be mined ({mined.error}); choose others with --except or --seed")
        own = erasures.Erasures(
            self.model, self.tokenizer, name, mined.capsule, self.args.out / "adapters", self.settings, self.args.seed
        )
        begun, cpu = time.perf_counter(), time.process_time()
        state = own.state(method)
        made = time.perf_counter() - begun
        found = self._judged(name, state)
        gate = state.capsules
        about = {
            "seconds": round(time.perf_counter() - begun, 1), "processor_seconds": round(time.process_time() - cpu, 1),
            "names": False, "model": self.args.model, "adapter": None, "erased_model": method, "reference": None,
            "max_false_fire": None, "capsules": [{"id": c.id, "digest": c.digest, "bytes": c.nbytes} for c in gate],
        }  # fmt: skip
        audit, tables, asked = found
        clean = cleaner([Subject(name)], [fact.subject for fact in self.others])
        table = clean(results(audit, tables, about)) | {"erased_model": method}
        table["forwards"] = asked
        make_folder(self.folder)
        write_json(self.file(method, number), table | {"made_seconds": round(made, 1)})

    def _judged(self, name: str, state: State) -> tuple[Audit, dict[str, Any], dict[str, int]]:
        asked, saved = self.outputs.asked, self.outputs.saved
        audit = Audit(
            self.before, state, self.tokenizer, [Subject(name)], [f for f in self.facts if f.subject == name],
            self.others, self.text, least_excess=self.args.least_excess, quick=True, seed=self.args.seed,
            outputs=self.outputs,
        )  # fmt: skip
        tables = run_suites(audit, SUITES)
        return audit, tables, {"asked": self.outputs.asked - asked, "saved": self.outputs.saved - saved}


def main() -> None:
    args = options()
    facts = load_facts(args.facts)
    subjects = chosen(facts, args)
    methods = args.only or list(erasures.METHODS)
    comparison, begun = Comparison(args, facts, subjects), time.monotonic()
    part, parts = args.part
    own = range(part, len(subjects), parts)
    pending = [(m, n) for n in own for m in methods if not comparison.file(m, n).is_file()]
    for done, (method, number) in enumerate(pending, 1):
        if args.seconds is not None and time.monotonic() - begun > args.seconds:
            common.say(f"{len(pending) - done + 1} audits are left; run it again and it goes on from here")
            break
        start = time.monotonic()
        comparison.audit(method, number)
        if method == erasures.UNTOUCHED:
            comparison.keep_outputs()
        common.say(f"{done} of {len(pending)}: {method}, subject {number + 1}, {time.monotonic() - start:.0f} s")
    show(comparison, methods)


def show(comparison: Comparison, methods: Sequence[str]) -> None:
    """The table and the pages, each method over the subjects that are done for it."""
    each = {
        m: [load_results(file) for n in range(len(comparison.subjects)) if (file := comparison.file(m, n)).is_file()]
        for m in methods
    }
    pools = {method: pooled(found) for method, found in each.items() if found}
    if not pools:
        return
    for method, pool in pools.items():
        make_folder(comparison.args.out / method)
        write_json(comparison.args.out / method / "results.json", pool)
    *others, last = pools
    page = eval_page(pools[last], [(m, pools[m]) for m in others], label=last)
    write_text(comparison.args.out / "report.html", page)
    rows = [line(method, pool, each[method]) for method, pool in pools.items()]
    common.show("Erased one subject at a time, and audited", COLUMNS, rows)
    asked, saved = (sum(pool["forwards"][key] for pool in pools.values()) for key in ("asked", "saved"))
    print(f"{asked:,} prompts asked, {saved:,} of them ({saved / asked:.0%}) answered from what was asked before")
    common.write_json(comparison.args.json, {"columns": COLUMNS, "rows": rows})


def line(method: str, pool: dict[str, Any], each: Sequence[dict[str, Any]]) -> list[Any]:
    """One row of the table. asking: drawn out by the attack that only asks and draws out most; guessing: what the same
    gets for others. 4 bits, relearned: facts whose answer is again the likeliest."""
    attacks = {row["name"]: row for row in pool["attacks"]["attacks"]}
    asking = max((a for a in attacks.values() if a["access"] == "prompt"), key=lambda a: a["success"])
    otherwise = [q["kept"]["mean"] for q in pool["questions"] if q["question"] != "direct" and q["known"]]
    removable = pool["states"]["after"]["removable"]

    def changed(name: str) -> Any:
        return TAKEN_OFF if removable else attacks.get(name, {}).get("success")

    return [
        method,
        len(each),
        "/".join(str(pool["verdicts"].get(verdict, 0)) for verdict in VERDICTS),
        pool["kept"]["mean"],
        common.interval(pool["kept"]),
        max(otherwise, default=None),
        asking["success"],
        asking["reference"] and asking["reference"]["success"],
        changed("quantised, nf4"),
        changed("relearned, same facts"),
        pool["figures"]["neighbours"]["after"],
        pool["figures"]["perplexity"]["after"],
        _mean(one["made_seconds"] for one in each),
        _mean(one["seconds"] - one["made_seconds"] for one in each),
    ]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


if __name__ == "__main__":
    common.run(main)
