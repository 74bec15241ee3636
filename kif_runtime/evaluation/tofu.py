"""The suite `tofu`: TOFU's metrics for each state, and against a reference that never saw the forget set."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import KifError
from . import mia, tofu_metrics
from .audit import Audit
from .tofu_sets import NEW_TOKENS, Item, Measured, find_sets, load_set, measure
from .utility import sampled

Sets = Mapping[str, Measured]  # by name: forget, retain, real_authors, world_facts, holdout


def run(audit: Audit) -> dict[str, Any]:
    """TOFU: forget quality, model utility, memorisation, membership, and their parts, by state.

    {"questions": {set: count}, "states": {state: metrics of one model}, "against": {state: what needs the reference} or
    None}. The sets are those of the folder given as `tofu`; a forget quality means something only against a reference
    that was trained by the same recipe without the forget set.
    """
    folder = audit.data.get("tofu")
    if folder is None:
        raise KifError("TOFU's sets are needed; give their folder with --data tofu=FOLDER")
    most, tokens = audit.pick(quick=6, full=40), audit.pick(quick=32, full=NEW_TOKENS)
    sets = {}
    for name, path in find_sets(folder).items():
        items = load_set(path, perturbed=name != "holdout")
        # forget quality is the p of a test, which grows with fewer questions: in full it is asked over all of them
        whole = name in ("forget", "holdout") and not audit.quick
        sets[name] = items if whole else sampled(items, most, audit.random(f"tofu:{name}"))
    measured = {}
    for state in audit.states:
        with audit.running(state) as on:
            measured[state.name] = measure_sets(
                on.model, audit.tokenizer, sets, generate=tokens, progress=audit.progress
            )
    never = measured.get(audit.reference.name) if audit.reference else None
    target = measured[audit.before.name]
    return {
        "questions": {name: len(items) for name, items in sets.items()},
        "states": {name: metrics(found) for name, found in measured.items()},
        "against": {n: against(found, never, target) for n, found in measured.items()} if never else None,
    }


def measure_sets(
    model: Any, tokenizer: Any, sets: Mapping[str, Sequence[Item]], *, generate: int = NEW_TOKENS, **options: Any
) -> dict[str, Measured]:
    """Every set measured; nothing is generated for the holdout."""
    return {
        name: measure(model, tokenizer, items, generate=0 if name == "holdout" else generate, **options)
        for name, items in sets.items()
    }


def metrics(sets: Sets) -> dict[str, Any]:
    """What one model's measures give by themselves."""
    forget = sets["forget"]
    parts = utility_parts(sets)
    whole = [value for value in parts.values() if value is not None]
    table: dict[str, Any] = {
        "forget_probability": forget.probability,
        "forget_rouge": _mean(forget.recall),
        "forget_truth_ratio": tofu_metrics.forget_truth_ratio(forget.truth),
        "paraphrase_probability": forget.paraphrase_probability,
        "exact_memorisation": _mean(forget.exact),
        "extraction_strength": _mean(forget.extraction),
        "memorisation": memorisation(forget),
        "parts": parts,
        "model_utility": tofu_metrics.model_utility(whole) if len(whole) == len(parts) else None,
    }
    if "holdout" in sets:
        table["auc"] = aucs(forget, sets["holdout"])
        table["priv_leak"] = mia.priv_leak(table["auc"]["min_k"])
    return table


def against(sets: Sets, reference: Sets, target: Sets) -> dict[str, Any]:
    """What a model's measures give against those of the reference; utility relative to the model before unlearning."""
    p, statistic = tofu_metrics.forget_quality(sets["forget"].truth, reference["forget"].truth)
    table: dict[str, Any] = {"forget_quality": p, "ks_statistic": statistic}
    own, usual = (metrics(one)["model_utility"] for one in (sets, target))
    table["relative_utility"] = own / usual if own is not None and usual else None
    if "holdout" in sets and "holdout" in reference:
        found, never = (aucs(one["forget"], one["holdout"]) for one in (sets, reference))
        scores = {name: tofu_metrics.privacy_score(value, never[name]) for name, value in found.items()}
        private = tofu_metrics.privacy([scores[name] for name in ("loss", "zlib", "min_k", "min_k++")])
        table |= {
            "priv_leak": mia.priv_leak(found["min_k"], never["min_k"]),
            "relative_difference": mia.relative_difference(found["min_k"], never["min_k"]),
            "auc_by_reference": mia.auc(*_relative(sets, reference)),
            "privacy": private,
        }
        if table["relative_utility"] is not None:
            memory = metrics(sets)["memorisation"]
            table["aggregate"] = tofu_metrics.aggregate(memory, private, min(1.0, table["relative_utility"]))
    return table


def utility_parts(sets: Sets) -> dict[str, float | None]:
    """The nine numbers of model utility; None for ROUGE where nothing was generated."""
    parts: dict[str, float | None] = {}
    for name in tofu_metrics.UTILITY_PARTS:
        found = sets[name]
        parts[f"{name}_probability"] = found.probability if name == "retain" else found.probability_with_options
        parts[f"{name}_rouge"] = _mean(found.recall)
        parts[f"{name}_truth_ratio"] = tofu_metrics.retain_truth_ratio(found.truth)
    return parts


def memorisation(forget: Measured) -> float:
    truth = tofu_metrics.prob_mean_truth_ratio(forget.right, forget.wrong)
    return tofu_metrics.memorisation(
        float(np.mean(forget.extraction)), float(np.mean(forget.exact)), forget.paraphrase_probability, truth
    )


def aucs(forget: Measured, holdout: Measured) -> dict[str, float]:
    """By method of membership inference; 1 is plainly still a member."""
    return {name: mia.auc(scores, holdout.membership[name]) for name, scores in forget.membership.items()}


def _relative(sets: Sets, reference: Sets) -> tuple[list[float], list[float]]:
    """Reference scores ℓ − ℓ_ref of the forget set and of the holdout."""
    forget, holdout = (
        [a - b for a, b in zip(sets[name].loss, reference[name].loss, strict=True)] for name in ("forget", "holdout")
    )
    return forget, holdout


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
