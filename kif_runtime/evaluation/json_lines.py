"""Benchmark files: JSON lines with fields of known types."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from ..json_lines import read_lines

Fields = Mapping[str, type | tuple[type, ...]]


def read_rows(path: str | os.PathLike[str], fields: Fields) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, each with all of `fields` of their types; other fields are kept as they are.

    Raises KifError, naming file and line, for a file that cannot be read, a row that is no object, or a field that is
    missing or of another type; also for a file without rows.
    """
    holds = f"rows; give a JSON lines file with {', '.join(fields)}"
    return read_lines(path, partial(_checked, fields=fields), holds)


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
