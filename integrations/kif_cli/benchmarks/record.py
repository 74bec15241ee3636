"""The results of a measurement, on disk after every row: a run that was cut off goes on where it was."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..outputs import make_folder, write_json
from .measuring import circumstances

Row = dict[str, Any]


class Record:
    """Tables of rows, and the circumstances that all of them were taken under.

    folder: where results.json is kept, None for nowhere. It is taken up again if machine, versions, commit and what was
    `asked` (as the model and the number of rounds) are the same; not from an unclean tree, whose code may have changed.
    """

    def __init__(self, folder: Path | None, asked: Mapping[str, Any]) -> None:
        self._folder = folder
        self.results: dict[str, Any] = {"circumstances": circumstances() | dict(asked)}
        if folder is not None:
            self._take_up(folder / "results.json")

    def _take_up(self, path: Path) -> None:
        try:
            earlier = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        now = self.results["circumstances"]
        if isinstance(earlier, dict) and earlier.get("circumstances") == now and now["clean_tree"] is not False:
            self.results = earlier

    def rows(self, table: str, **key: Any) -> list[Row]:
        """Those that have these values."""
        return [row for row in self.results.get(table, ()) if all(row.get(k) == v for k, v in key.items())]

    def add(self, table: str, rows: Iterable[Row]) -> None:
        """Put them at the end of the table, and everything on disk, atomically."""
        self.results.setdefault(table, []).extend(rows)
        if self._folder is not None:
            make_folder(self._folder)
            write_json(self._folder / "results.json", self.results)
