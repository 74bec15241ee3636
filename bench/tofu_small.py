"""A small TOFU on this machine: forget quality and model utility of the runtime gate and of every baking objective.

Two models are fine-tuned by one recipe: the target on all authors, the reference on all but those to forget; a group of
holdout authors is in neither. Erasures of the target are then compared with the reference, over several seeds: forget
quality (p and D of the Kolmogorov-Smirnov test), model utility ÷ the reference's, memorisation, PrivLeak. Everything is
kept under the cache folder; run it again and it goes on. FOLDER holds TOFU's files: full, forget10_perturbed,
retain_perturbed, real_authors_perturbed, world_facts_perturbed.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import common
from tofu_methods import REFERENCE, ROWS, TARGET, Methods, Plan, questions
from tofu_training import Recipe, trained

from kif_runtime import KifError
from kif_runtime.evaluation.tofu import against, measure_sets, metrics
from kif_runtime.evaluation.tofu_sets import Item, Measured, load_set
from kif_runtime.fingerprint import fingerprint
from kif_runtime.models import cache_folder

AUTHORS, FORGETTABLE, HOLDOUT_FROM = 200, 20, 160


def plan(authors: int, forget: int, holdout: int) -> Plan:
    """`authors` in training, `forget` of them to forget; those kept come first, since they have perturbed answers."""
    if not 1 <= forget <= FORGETTABLE or not forget < authors <= HOLDOUT_FROM or not 1 <= holdout <= FORGETTABLE:
        raise KifError(
            f"choose 1 to {FORGETTABLE} authors to forget, at most {HOLDOUT_FROM} in all, 1 to {FORGETTABLE} held out"
        )
    last = AUTHORS - FORGETTABLE
    return Plan(
        tuple(range(last, last + forget)),
        tuple(range(authors - forget)),
        tuple(range(HOLDOUT_FROM, HOLDOUT_FROM + holdout)),
    )


def main() -> None:
    args = options()
    chosen = plan(args.authors, args.forget, args.holdout)
    full = load_set(args.folder / "full.json", perturbed=False)
    sets = evaluation_sets(args.folder, full, chosen, args.questions)
    seeds: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in range(args.seeds):
        recipe = Recipe(args.epochs, args.batch, args.rate, seed)
        seeds[seed] = one_seed(args, full, sets, chosen, recipe)
    table = {method: over_seeds([s[method] for s in seeds.values() if method in s]) for method in seeds[0]}
    settings = {k: str(v) for k, v in vars(args).items()} | {"plan": asdict(chosen)}
    common.write_json(args.json, {"settings": settings, "methods": table, "seeds": seeds})
    heads = ["", "seeds", "FQ (p)", "D", "MU", "MU ÷ reference", "forget P", "Mem", "PrivLeak"]
    keys = ("forget_quality", "ks_statistic", "model_utility", "relative_utility", "forget_probability",
            "memorisation", "priv_leak")  # fmt: skip
    common.show("TOFU, small", heads, [[m, row["seeds"], *(row.get(k) for k in keys)] for m, row in table.items()])


def options() -> argparse.Namespace:
    parser = common.parser(__doc__ or "", facts=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--authors", type=int, default=40, help="in training (default: 40)")
    parser.add_argument("--forget", type=int, default=4, help="of these to forget (default: 4)")
    parser.add_argument("--holdout", type=int, default=4, help="in neither model (default: 4)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--rate", type=float, default=Recipe.rate)
    parser.add_argument("--questions", type=int, help="at most so many of each set when measuring (default: all)")
    parser.add_argument("--tokens", type=int, default=200, help="of a generated answer")
    parser.add_argument("--objectives", nargs="*", help="which to bake (default: every registered one)")
    parser.add_argument("--bake-steps", type=int, help="instead of each objective's own number")
    parser.add_argument("--no-gate", action="store_true")
    return parser.parse_args()


def evaluation_sets(folder: Path, full: Sequence[Item], chosen: Plan, most: int | None) -> dict[str, list[Item]]:
    """TOFU's sets for these authors; `most` rows of each, spread evenly."""
    where = {item.question: number // ROWS for number, item in enumerate(full)}

    def of(name: str, authors: Sequence[int]) -> list[Item]:
        return [i for i in load_set(folder / name) if where.get(i.question) in authors]

    sets = {
        "forget": of("forget10_perturbed.json", chosen.forget),
        "retain": of("retain_perturbed.json", chosen.retain),
        "real_authors": load_set(folder / "real_authors_perturbed.json"),
        "world_facts": load_set(folder / "world_facts_perturbed.json"),
        "holdout": questions(full, chosen.holdout),
    }
    if empty := [name for name, items in sets.items() if not items]:
        raise KifError(f"no row of the set {empty[0]!r} is about the chosen authors; choose others, or check the files")
    return {
        name: items if most is None else items[:: max(1, len(items) // most)][:most] for name, items in sets.items()
    }


def one_seed(
    args: argparse.Namespace, full: Sequence[Item], sets: dict[str, list[Item]], chosen: Plan, recipe: Recipe
) -> dict[str, dict[str, Any]]:
    """Every method's numbers for one seed, from the journal where they were measured before."""
    base, tokenizer = common.load(args)
    made = common.digest([fingerprint(base), asdict(chosen), asdict(recipe)])
    folder = cache_folder() / "tofu-small" / made
    journal_name = common.digest([args.questions, args.tokens, args.bake_steps, common.mining_code()])
    models = {}
    for name, authors in ((TARGET, (*chosen.retain, *chosen.forget)), (REFERENCE, chosen.retain)):
        models[name] = copy.deepcopy(base)
        trained(models[name], tokenizer, questions(full, authors), recipe, folder / name, f"seed {recipe.seed}, {name}")
    journal = common.Journal(folder / f"measured-{journal_name}.jsonl")
    target, reference = models[TARGET], models[REFERENCE]
    methods = Methods(args, target, tokenizer, full, chosen, folder, recipe.seed)
    measured: dict[str, dict[str, Measured]] = {}
    for name in (REFERENCE, TARGET, *methods.names()):
        if name not in journal.rows:
            try:
                with methods.applied(name, reference) as (model, extra):
                    found = measure_sets(model, tokenizer, sets, generate=args.tokens)
                journal.append(name, {"measured": {k: asdict(v) for k, v in found.items()}} | extra)
            except KifError as problem:
                common.say(f"seed {recipe.seed}, {name}: {problem}")
                continue
            common.say(f"seed {recipe.seed}: measured {name}")
        measured[name] = {k: _measured(v) for k, v in journal.rows[name]["measured"].items()}
    return {
        name: metrics(found) | against(found, measured[REFERENCE], measured[REFERENCE])
        for name, found in measured.items()
    }


def over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of p, means of the rest."""
    table: dict[str, Any] = {"seeds": len(rows)}
    for key, value in rows[0].items():
        if isinstance(value, int | float):
            values = sorted(row[key] for row in rows if row.get(key) is not None)
            table[key] = values[len(values) // 2] if key == "forget_quality" else common.mean(values)
    return table


def _measured(row: dict[str, Any]) -> Measured:
    """From JSON, where tuples became lists."""
    return replace(Measured(**row), membership={name: tuple(values) for name, values in row["membership"].items()})


if __name__ == "__main__":
    common.run(main)
