"""Reading benchmark files: JSON lines with fields of known types, refused with the line that is wrong."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import KifError
from ..files import reason, shown

Fields = Mapping[str, type | tuple[type, ...]]


def read_rows(path: str | os.PathLike[str], fields: Fields) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, each with all of `fields` of their types; other fields are kept as they are.

    Raises KifError, naming file and line, for a file that cannot be read, a row that is no object, or a field that is
    missing or of another type; also for a file without rows.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise KifError(f"{shown(path)} is not UTF-8 text; give a JSON lines file") from None
    except OSError as failure:
        raise KifError(f"cannot read {shown(path)}: {reason(failure)}") from failure
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(_checked(json.loads(line), fields))
            except (ValueError, RecursionError) as problem:
                raise KifError(f"{shown(path)}, line {number}: {_said(problem)}; mend or remove the line") from None
    if not rows:
        raise KifError(f"{shown(path)} holds no rows; give a JSON lines file with {', '.join(fields)}")
    return rows


def _checked(row: Any, fields: Fields) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError("a row is a JSON object")
    for name, kind in fields.items():
        value = row.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, str) and not value.strip()):
            raise ValueError(f"{name!r} is missing or of another type")
        if isinstance(value, list) and not value:
            raise ValueError(f"{name!r} is empty")
    return row


def _said(problem: Exception) -> str:
    if isinstance(problem, json.JSONDecodeError):
        return f"no JSON ({problem.msg} at character {problem.pos})"
    return "no JSON that could be read (nested too deep)" if isinstance(problem, RecursionError) else str(problem)
