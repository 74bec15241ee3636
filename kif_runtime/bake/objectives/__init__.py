"""Objectives by name. Each is a small class in a module of its own, imported on first use."""

import inspect
from importlib import import_module
from typing import Any

from ...errors import BakingError, one_line
from .base import Objective, Setup, Step

__all__ = ["OBJECTIVES", "Objective", "Setup", "Step", "objective"]

DEFAULT = "capsule"

OBJECTIVES: dict[str, str] = {
    "capsule": "capsule:CapsuleObjective",
    "kif-paper": "kif_paper:KifPaper",
    "reglu": "reglu:Reglu",
    "rmu": "rmu:Rmu",
    "srmu": "rmu:Srmu",
    "egup": "egup:Egup",
    "gradient-ascent": "ascent:GradientAscent",
    "gradient-difference": "ascent:GradientDifference",
    "dpo": "preference:Dpo",
    "idk-dpo": "preference:IdkDpo",
    "altpo": "preference:AltPo",
    "npo": "preference:Npo",
    "simnpo": "preference:SimNpo",
    "undial": "undial:Undial",
    "unierase": "unierase:UniErase",
    "orthogonal": "orthogonal:Orthogonal",
}
"""Name → module and class."""


def objective(name: str, rna: float = 0.0, **options: Any) -> Objective:
    """The objective called `name`, with the noise of `rna` on the retain reference if that is not 0.

    Raises BakingError for another name, or options that it does not have.
    """
    if name not in OBJECTIVES:
        raise BakingError(f"unknown objective {one_line(name, 40)!r}; choose one of {', '.join(OBJECTIVES)}")
    module, _, kind = OBJECTIVES[name].partition(":")
    made = getattr(import_module(f".{module}", __name__), kind)
    known = [p for p in inspect.signature(made).parameters]
    for option in options:
        if option not in known:
            raise BakingError(f"objective {name!r} has no option {one_line(option, 40)!r}; it has {', '.join(known)}")
    chosen: Objective = made(**options)
    if not rna:
        return chosen
    from .rna import Rna

    return Rna(chosen, rna)
