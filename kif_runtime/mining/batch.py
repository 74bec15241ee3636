"""Many subjects from one file of requests, one error per line, resumable."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..capsule import Capsule
from ..errors import KifError, MiningError
from ..files import reason, shown
from ..fingerprint import adapter_fingerprint
from ..ids import marks
from .api import asked, checked_id, mine
from .preparing import prepare
from .subject import checked_forms

_FIELDS = {"name", "aliases", "kind", "id", "private", "prompts", "controls"}


@dataclass
class BatchReport:
    """Line numbers, from 1: mined now, found done before, failed with why."""

    done: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)


def mine_batch(
    model: nn.Module, tokenizer: Any, requests: str | Path, out: str | Path, *,
    progress: Callable[[int, int, str], None] | None = None, **options: Any,
) -> BatchReport:  # fmt: skip
    """Mine every line of `requests` (JSON objects: `name`, and optionally keywords of `mine`) into folder `out`.

    `options` are keywords of `mine` for every line; a line's own win. A line whose capsule is in `out` already is
    skipped, so an interrupted run goes on where it stopped; a private line needs an `id` for that, without one it is
    mined again. One that was mined otherwise is an error of the line. A bad line is reported and the others are mined.
    Raises MiningError where the file cannot be read or `out` cannot be made.
    """
    lines = _lines(Path(requests))
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise MiningError(f"cannot make {shown(folder)}: {reason(failure)}") from failure
    adapted = bool(options.get("adapted"))
    chosen = {key: options[key] for key in ("site", "passages") if options.get(key) is not None}
    control = prepare(model, tokenizer, adapted=adapted, progress=progress, **chosen)
    adapter = adapter_fingerprint(model) if adapted else None
    report = BatchReport()
    taken: dict[str | None, int] = {}
    for position, (number, line) in enumerate(lines):
        try:
            request = options | _request(line)
            id = _id(request)
            if id in taken:
                raise MiningError(f"it has the same id as line {taken[id]}; give one of them another id")
            path = folder / f"{id}.kif.safetensors"
            if id is not None and path.exists():
                there = Capsule.load(path, control.fingerprint)
                wanted = asked(_marks(id, request), adapter, **request | {"site": control.site})
                _check_mined_so(there, path, wanted)
                report.skipped.append(number)
            else:
                capsule = mine(model, tokenizer, **request)
                capsule.save(folder / f"{capsule.id}.kif.safetensors")
                report.done.append(number)
            if id is not None:
                taken[id] = number
        except KifError as failure:
            report.failed.append((number, str(failure)))
        if progress:
            progress(position + 1, len(lines), "mining subjects")
    return report


_SAID = {"forms": "name or aliases", "own_text": "text", "step_size": "step size", "any_case": "choice of --any-case"}


def _check_mined_so(there: Capsule, path: Path, wanted: dict[str, Any]) -> None:
    """Raise MiningError where the capsule there is not what this line would be mined into."""
    said = there.provenance.get("settings")
    said = said if isinstance(said, dict) else {}
    before, now = there.provenance | said, wanted | wanted["settings"]
    keys = {*wanted, *said, *wanted["settings"]} - {"settings"}
    if other := sorted(key for key in keys if before.get(key) != now.get(key)):
        told = shown(_SAID.get(other[0], other[0]), 40)
        raise MiningError(f"{shown(path)} was mined with another {told}; choose another folder, or remove it first")


def _marks(id: str, request: dict[str, Any]) -> list[str] | None:
    forms = checked_forms(request["name"], request.get("aliases") or ())
    return None if request.get("private") else marks(id, forms)


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as failure:
        told = reason(failure) if isinstance(failure, OSError) else "it is not UTF-8 text"
        raise MiningError(f"cannot read {shown(path)}: {told}") from failure
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def _id(request: dict[str, Any]) -> str | None:
    """The id of the line's capsule; None where it will be random."""
    if request.get("private") and request.get("id") is None:
        return None
    return checked_id(request.get("id"), request["name"], False)


def _request(line: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise MiningError('it is not JSON; write one object a line, such as {"name": "…"}') from None
    if not isinstance(request, dict) or not isinstance(request.get("name"), str):
        raise MiningError('it has no "name"; write one object a line, such as {"name": "…"}')
    if unknown := sorted(set(request) - _FIELDS):
        raise MiningError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(_FIELDS))}")
    for key in ("aliases", "prompts", "controls"):
        value = request.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(x, str) for x in value)):
            raise MiningError(f"field {key!r} must be a list of strings")
    for key in ("kind", "id"):
        if request.get(key) is not None and not isinstance(request[key], str):
            raise MiningError(f"field {key!r} must be a string")
    if not isinstance(request.get("private", False), bool):
        raise MiningError("field 'private' must be true or false")
    return {k: v for k, v in request.items() if v is not None}
