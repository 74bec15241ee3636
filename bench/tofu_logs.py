"""TOFU's metrics recomputed from the per-question values in open-unlearning's public logs, against what these say.

FOLDER holds files named TOFU_EVAL.json, as `saves/eval` of that project does. What needs a model is not recomputed:
per-token log-probabilities are not in the logs, so EM, ES and the membership scores themselves are taken as they are.
Prints, for each metric, how many values were compared and the largest relative difference.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

from kif_runtime import KifError
from kif_runtime.evaluation import mia
from kif_runtime.evaluation import tofu_metrics as tofu
from kif_runtime.evaluation.rouge import rouge_l

Log = dict[str, Any]
Pair = tuple[str, float, float]  # metric, recomputed, logged
RETAIN = {"forget10": "retain90", "forget05": "retain95", "forget01": "retain99"}
RATIOS = (  # set, losses of the right answers, logged ratios, aggregate
    ("forget", "forget_Q_A_PARA_Prob", "forget_truth_ratio", tofu.forget_truth_ratio),
    ("retain", "retain_Q_A_PARA_Prob", "retain_Truth_Ratio", tofu.retain_truth_ratio),
    ("ra", "ra_Q_A_Prob", "ra_Truth_Ratio", tofu.retain_truth_ratio),
    ("wf", "wf_Q_A_Prob", "wf_Truth_Ratio", tofu.retain_truth_ratio),
)
NINE = (
    "retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio", "ra_Q_A_Prob_normalised", "ra_Q_A_ROUGE",
    "ra_Truth_Ratio", "wf_Q_A_Prob_normalised", "wf_Q_A_ROUGE", "wf_Truth_Ratio",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    paths = sorted(args.folder.rglob("TOFU_EVAL.json"))
    if not paths:
        raise KifError(f"{args.folder} holds no TOFU_EVAL.json; give the folder of the logs")
    found: dict[str, list[float]] = {}
    for path in paths:
        for metric, ours, theirs in compared(path):
            difference = abs(ours - theirs) / abs(theirs) if theirs else abs(ours)
            found.setdefault(metric, []).append(difference)
    rows = [[metric, len(values), max(values)] for metric, values in found.items()]
    common.show(f"{len(paths)} logs", ["", "values", "largest relative difference"], rows)
    common.write_json(args.json, {"logs": len(paths), "metrics": {m: {"values": n, "worst": w} for m, n, w in rows}})


def compared(path: Path) -> Iterator[Pair]:
    log = json.loads(path.read_text(encoding="utf-8"))
    yield from answers(log)
    yield from ratios(log)
    yield (
        "model utility",
        tofu.model_utility([log[name]["agg_value"] for name in NINE]),
        log["model_utility"]["agg_value"],
    )
    yield from membership(log)
    reference = retained(path)
    if reference is None:
        yield "PrivLeak", mia.priv_leak(log["mia_min_k"]["auc"]), log["privleak"]["agg_value"]
        return
    own, never = ([row["score"] for row in rows(one, "forget_truth_ratio")] for one in (log, reference))
    yield "forget quality", tofu.forget_quality(own, never)[0], log["forget_quality"]["agg_value"]
    leak = mia.priv_leak(log["mia_min_k"]["auc"], reference["mia_min_k"]["auc"])
    yield "PrivLeak", leak, log["privleak"]["agg_value"]


def answers(log: Log) -> Iterator[Pair]:
    for name in [name for name in log if name.endswith("_ROUGE")]:
        found = []
        for row in rows(log, name):
            found.append(rouge_l(row["ground_truth"], row["generation"]).recall)
            yield "ROUGE-L recall of an answer", found[-1], row["rougeL_recall"]
        yield "ROUGE-L recall of a set", float(np.mean(found)), log[name]["agg_value"]
    for name in ("forget_Q_A_Prob", "retain_Q_A_Prob", "forget_Q_A_PARA_Prob"):
        for row in rows(log, name):
            yield "probability (logged in fp32)", tofu.probability(row["avg_loss"]), row["prob"]
    for which in ("ra", "wf"):
        pairs = zip(rows(log, f"{which}_Q_A_Prob"), rows(log, f"{which}_Q_A_PERT_Prob"), strict=True)
        values = [tofu.probability_with_options(a["avg_loss"], b["avg_loss"]) for a, b in pairs]
        yield (
            "probability with options, of a set",
            float(np.mean(values)),
            log[f"{which}_Q_A_Prob_normalised"]["agg_value"],
        )


def ratios(log: Log) -> Iterator[Pair]:
    for which, right, logged, aggregate in RATIOS:
        pairs = zip(rows(log, right), rows(log, f"{which}_Q_A_PERT_Prob"), strict=True)
        found = [tofu.truth_ratio(a["avg_loss"], b["avg_loss"]) for a, b in pairs]
        for ours, row in zip(found, rows(log, logged), strict=True):
            yield "truth ratio of a question", ours, row["score"]
        yield "truth ratio of a set", aggregate(found), log[logged]["agg_value"]


def membership(log: Log) -> Iterator[Pair]:
    for name in [name for name in log if name.startswith("mia_")]:
        sides = ([row["score"] for row in log[name][side]["value_by_index"].values()] for side in ("forget", "holdout"))
        yield f"AUC, {name.removeprefix('mia_')}", mia.auc(*sides), log[name]["auc"]
    both = zip(rows(log, "forget_Q_A_Prob"), log["mia_loss"]["forget"]["value_by_index"].values(), strict=True)
    for own, score in both:
        yield "LOSS is the loss of the answer", own["avg_loss"], score["score"]


def retained(path: Path) -> Log | None:
    """The log of the reference model, for a model trained on everything."""
    run = path.relative_to(path.parents[2]).parts if path.parent.name.startswith("evals_") else ()
    if not run:
        return None
    size = path.parent.name.removeprefix("evals_")
    other = path.parents[2] / run[0].replace("full", RETAIN[size]) / path.name
    return json.loads(other.read_text(encoding="utf-8")) if other.is_file() else None


def rows(log: Log, name: str) -> list[Log]:
    values = log[name]["value_by_index"]
    return [values[key] for key in sorted(values, key=int)]


if __name__ == "__main__":
    common.run(main)
