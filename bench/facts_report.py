"""The figures of `facts_table.py` over subjects and kinds, and how they are printed."""

from typing import Any

import common

from kif_runtime import KifError
from kif_runtime.evaluation.run import kept_summaries
from kif_runtime.evaluation.statistics import bootstrap, summary


def aggregate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the whole table, and per kind."""
    forms = list(dict.fromkeys(f["form"] for row in rows for f in row["facts"]))
    kinds = sorted({row["kind"] for row in rows})
    return {
        "kept": {form: kept_summaries([f for r in rows for f in r["facts"] if f["form"] == form]) for form in forms},
        "side_effects": side_effects(rows),
        "kinds": {kind: by_kind([row for row in rows if row["kind"] == kind]) for kind in kinds},
        "worst": worst_ten(rows),
    }


def by_kind(rows: list[dict[str, Any]]) -> dict[str, Any]:
    form = rows[0]["facts"][0]["form"]
    known = [f for row in rows for f in row["facts"] if f["form"] == form and f["kept"] is not None]
    return {"kept": summary([f["kept"] for f in known], [f["subject"] for f in known])} | side_effects(rows)


def side_effects(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over subjects, each of which was attached alone."""
    if not rows:
        return {}
    text = [row["text"] for row in rows if row["text"]]
    change = [row["neighbours"]["mean"] for row in rows if row["neighbours"]["mean"] is not None]
    close = [row["neighbours"]["nearest_mean"] for row in rows if row["neighbours"]["nearest_mean"] is not None]
    return {
        "subjects": len(rows),
        "neighbours": common.mean(change),
        "neighbours_interval": bootstrap(change) if change else None,
        "neighbours_worst": max(change, default=None),
        "nearest": common.mean(close),
        "nearest_interval": bootstrap(close) if close else None,
        "nearest_worst": max(close, default=None),
        "perplexity_ratio": common.mean(t["ratio"] for t in text),
        "perplexity_ratio_worst": max((t["ratio"] for t in text), default=None),
        "false_fire": common.mean(t["false"] / max(1, t["negatives"]) for t in text),
        "false_fire_worst": max((t["false"] / max(1, t["negatives"]) for t in text), default=None),
        "touched": common.mean(t["touched"] / t["tokens"] for t in text),
        "mining_seconds": common.mean(row["mining"]["seconds"] for row in rows),
        "bytes": common.mean(row["mining"]["bytes"] for row in rows),
        "signatures": common.mean(row["mining"]["signatures"] for row in rows),
    }


def worst_ten(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    warnings = {row["subject"]: row["mining"]["warnings"] for row in rows}
    known = [f for row in rows for f in row["facts"] if f["kept"] is not None]
    known.sort(key=lambda f: -abs(f["kept"]))
    return [f | {"warnings": warnings[f["subject"]]} for f in known[:10]]


def show(rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    if not rows:
        raise KifError("no subject could be mined; see the messages above")
    columns = ["facts", "subjects", "kept", "95 %", "beyond ±0.2", "95 %"]
    parts = {"kept": "all", "kept_first": "subject first", "kept_later": "subject later"}
    lines = []
    for form, summaries in result["kept"].items():
        for part, label in parts.items():
            s = summaries[part]
            values = [s.get("mean"), common.interval(s), s.get("beyond"), common.interval(s, "beyond_interval")]
            lines.append([f"{form}, {label}", s["facts"], s["subjects"], *values])
    common.show("excess knowledge kept", ["", *columns], lines)
    _show_kinds(result)
    common.show(
        "the worst ten",
        ["prompt", "answer", "form", "before", "after", "prior", "kept"],
        [
            [f[name] for name in ("prompt", "answer", "form", "before", "after", "prior", "kept")]
            for f in result["worst"]
        ],
    )
    for subject, warning in dict.fromkeys((f["subject"], w) for f in result["worst"] for w in f["warnings"]):
        print(f"  {subject}: {warning}")
    moved = sorted((r for r in rows if r["neighbours"]["worst"]), key=lambda r: -r["neighbours"]["worst"]["change"])
    common.show(
        "others' facts that moved most, one per subject attached",
        ["attached", "prompt", "|Δp|", "facts touched", "mean |Δp| of nearest"],
        [
            [
                r["subject"],
                *(r["neighbours"]["worst"][n] for n in ("prompt", "change")),
                r["neighbours"]["touched"],
                r["neighbours"]["nearest_mean"],
            ]
            for r in moved[:10]
        ],
    )


def _show_kinds(result: dict[str, Any]) -> None:
    names = [
        "neighbours",
        "nearest",
        "perplexity_ratio",
        "false_fire",
        "touched",
        "mining_seconds",
        "bytes",
        "signatures",
    ]
    heads = ["|Δp| others", "nearest", "perplexity −1", "false fires", "touched", "mining s", "bytes", "signatures"]
    whole = result["side_effects"]

    def shown(entry: dict[str, Any], name: str) -> Any:
        value = entry[name]
        return round(value) if name == "bytes" else _less_one(value) if name == "perplexity_ratio" else value

    kept = next(iter(result["kept"].values()))["kept"]
    lines = []
    for label, entry in [*result["kinds"].items(), ("all", {"kept": kept} | whole)]:
        k = entry["kept"]
        values = [shown(entry, name) for name in names]
        lines.append([label, k["facts"], k.get("mean"), common.interval(k), k.get("beyond"), *values])
    common.show("by kind of subject", ["kind", "facts", "kept", "95 %", "beyond ±0.2", *heads], lines)
    common.show(
        "side effects over subjects, each attached alone",
        ["", "mean", "95 %", "worst subject"],
        [
            [
                "|Δp| of others",
                whole["neighbours"],
                common.interval(whole, "neighbours_interval"),
                whole["neighbours_worst"],
            ],
            ["|Δp| of nearest", whole["nearest"], common.interval(whole, "nearest_interval"), whole["nearest_worst"]],
            [
                "perplexity ratio − 1",
                _less_one(whole["perplexity_ratio"]),
                "",
                _less_one(whole["perplexity_ratio_worst"]),
            ],
            ["false fires per token", whole["false_fire"], "", whole["false_fire_worst"]],
        ],
    )


def _less_one(ratio: float | None) -> float | None:
    return None if ratio is None else ratio - 1
