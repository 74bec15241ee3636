"""Where results go. What cannot be written is refused before the work begins, not after it."""

import os
import tempfile
from pathlib import Path
from typing import Any

from kif_runtime.errors import KifError
from kif_runtime.files import atomic_write, reason, shown

from .console import to_json


def check_file(path: Path) -> None:
    """Raise KifError where a file cannot be put at `path`: its folder must be there and take one."""
    if path.is_dir() or path.name in ("", ".."):
        raise KifError(f"cannot write {shown(path)}: it is a folder; name a file")
    if path.exists() and not path.is_file():
        raise KifError(f"cannot write {shown(path)}: it is not a regular file; choose another name")
    _check_place(path, path.parent)


def check_folder(path: Path) -> None:
    """Raise KifError where files cannot be put into the folder `path`, which may have to be created."""
    place = path
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    _check_place(path, place)


def _check_place(path: Path, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # permissions alone do not tell: read-only, full, a file
            file.write(b"\0")
    except (OSError, ValueError) as failure:
        raise KifError(f"cannot write {shown(path)}: {reason(failure)}") from None


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as failure:
        raise KifError(f"cannot create the folder {shown(path)}: {reason(failure)}") from None


def write_text(path: Path, text: str) -> None:
    """Atomically and with mode 0600: what is asked of an erasure is private until its owner says otherwise."""
    atomic_write(path, text.encode())


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, to_json(value) + "\n")


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a UTF-8 file that are not blank, without the space around them."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise KifError(f"cannot read {what} from {shown(path)}: it is not UTF-8 text; convert it") from None
    except (OSError, ValueError) as failure:
        raise KifError(f"cannot read {what} from {shown(path)}: {reason(failure)}") from None
    if not any(lines):
        raise KifError(f"{shown(path)} holds no {what}; write one a line")
    return [line for line in lines if line]
