"""A policy: which verdicts and figures pass. A JSON file, for a pipeline that has to stop.

{"verdicts": ["erased", "suppressed"], "confidence": "medium", "at_most": {"kept": 0.1}, "at_least": {"mass": 0.0}}

Every part may be left out; the names of figures are those of `figures.WORDS`. What was not measured does not pass.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import KifError
from ..files import reason, shown
from .figures import WORDS, figures

PARTS = ("verdicts", "confidence", "at_most", "at_least")
VERDICTS = ("erased", "suppressed", "leaking", "unknown")
CONFIDENCE = ("low", "medium", "high")


def load_policy(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The policy in a file. Raises KifError, naming the file, for anything that is none."""
    try:
        policy = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as failure:
        raise KifError(f"cannot read {shown(path)}: {reason(failure)}") from None
    except (ValueError, RecursionError) as problem:
        raise KifError(f"{shown(path)} is no JSON ({problem}); write a policy as README shows one") from None
    try:
        _check(policy)
    except ValueError as problem:
        raise KifError(f"{shown(path)} is no policy: {problem}") from None
    return policy


def _check(policy: Any) -> None:
    if not isinstance(policy, dict) or not policy:
        raise ValueError(f"it is not an object with some of {', '.join(PARTS)}")
    for part in policy:
        if part not in PARTS:
            raise ValueError(f"unknown part {shown(part, 40)!r}; use {', '.join(PARTS)}")
    verdicts = policy.get("verdicts", [])
    if not isinstance(verdicts, list) or any(one not in VERDICTS for one in verdicts):
        raise ValueError(f"'verdicts' is not a list of {', '.join(VERDICTS)}")
    if policy.get("confidence", "low") not in CONFIDENCE:
        raise ValueError(f"'confidence' is not one of {', '.join(CONFIDENCE)}")
    for part in ("at_most", "at_least"):
        limits = policy.get(part, {})
        if not isinstance(limits, dict):
            raise ValueError(f"{part!r} is not an object of figures and limits")
        for name, limit in limits.items():
            if name not in WORDS:
                raise ValueError(f"unknown figure {shown(name, 40)!r} in {part!r}; use one of {', '.join(WORDS)}")
            if isinstance(limit, bool) or not isinstance(limit, int | float) or limit != limit:
                raise ValueError(f"the limit of {name!r} in {part!r} is no number")


def judge(
    policy: Mapping[str, Any], verdict: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One check a demand of `policy`: {"name", "passed", "text", "detail"}. All have to pass."""
    checks = []
    if "verdicts" in policy:
        allowed, found = policy["verdicts"], verdict["verdict"]
        text = f"The verdict is {' or '.join(allowed)}."
        checks.append(_checked("verdict", found in allowed, text, f"it is {found}"))
    if "confidence" in policy:
        least, found = policy["confidence"], verdict["confidence"]
        passed = CONFIDENCE.index(found) >= CONFIDENCE.index(least)
        checks.append(_checked("confidence", passed, f"The confidence is {least} at least.", f"it is {found}"))
    measured = figures(tables)
    for part, word in (("at_most", "at most"), ("at_least", "at least")):
        for name, limit in policy.get(part, {}).items():
            value = measured[name].after
            passed = value is not None and (value <= limit if part == "at_most" else value >= limit)
            detail = "not measured: give its suite" if value is None else f"it is {value:.4g}"
            checks.append(_checked(name, passed, f"{WORDS[name].capitalize()}: {word} {limit:g}.", detail))
    return checks


def _checked(name: str, passed: bool, text: str, detail: str) -> dict[str, Any]:
    return {"name": name, "passed": passed, "text": text, "detail": detail}
