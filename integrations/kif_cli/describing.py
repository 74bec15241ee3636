"""A capsule in plain values, as `show`, `mine` and the pages print it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kif_runtime import Capsule


def describe(capsule: "Capsule") -> dict[str, Any]:
    """Everything but the tensors, JSON-ready and with stable keys."""
    return {
        "id": capsule.id,
        "name": capsule.name,
        "aliases": list(capsule.aliases),
        "model": capsule.model,
        "width": capsule.width,
        "blocks": capsule.blocks,
        "operation": capsule.operation,
        "bytes": capsule.nbytes,
        "sites": list(capsule.sites),
        "rank": max(s.rank for s in capsule.signatures),
        "digest": capsule.digest,
        "signatures": [
            {
                "site": s.site,
                "role": s.role,
                "rank": s.rank,
                "gate": s.gate,
                "k": s.k,
                "tau": s.tau,
                "bias": round(float(s.bias), 6),
                "strength": float(s.strength),
                "calibration": s.calibration,
            }
            for s in capsule.signatures
        ],
        "calibration": capsule.calibration,
        "provenance": capsule.provenance,
    }


def summary(capsule: "Capsule") -> str:
    """One line: what it holds and what it costs."""
    sites = ", ".join(map(str, capsule.sites))
    rank = max(s.rank for s in capsule.signatures)
    count = len(capsule.signatures)
    return (
        f"{count} signature{'s' if count > 1 else ''} at block{'s' if len(capsule.sites) > 1 else ''} {sites}, "
        f"rank {rank}, {capsule.nbytes:,} bytes"
    )


def quality(calibration: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that mining leaves in a capsule's calibration, as (what, value); those that are there."""
    rows: list[tuple[str, str]] = []
    for key, what, form in (
        ("kind", "kind", "{}"),
        ("recall", "recall, held out", "{:.3f}"),
        ("false_positive_rate", "false fires per token", "{:.2g}"),
        ("near_miss_rate", "fires on names that share its words", "{:.2g}"),
        ("kept", "divergence from the prior left, held out", "{:.2f}"),
    ):
        value = calibration.get(key)
        if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
            rows.append((what, form.format(value)))
    return rows
