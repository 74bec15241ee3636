"""Reading a user's JSON lines file: every line is made into something, or refused with the line that is wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .errors import KifError
from .files import reason, shown

T = TypeVar("T")


def read_lines(
    path: str | os.PathLike[str], made: Callable[[Any], T], holds: str, *, error: type[KifError] = KifError
) -> list[T]:
    """`made` of the JSON value on every line that is not blank. `made` raises ValueError for a value it cannot take.

    holds: what the file should hold, for the message about an empty one, as in "facts; give lines with subject".
    Raises `error`, naming file and line, for a file that cannot be read, a line that is no JSON or not taken, and for a
    file with no line.
    """
    try:
        # splitlines would also split inside JSON strings; some editors put a mark at the start
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise error(f"{shown(path)} is not UTF-8 text; give a JSON lines file") from None
    except OSError as failure:
        raise error(f"cannot read {shown(path)}: {reason(failure)}") from failure
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(made(_json(line)))
            except ValueError as problem:
                raise error(f"{shown(path)}, line {number}: {problem}; mend or remove the line") from None
    if not found:
        raise error(f"{shown(path)} holds no {holds}")
    return found


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as problem:
        raise ValueError(f"no JSON ({problem.msg} at character {problem.pos})") from None
    except RecursionError:
        raise ValueError("no JSON that could be read (nested too deep)") from None
