"""What the command prints: results on stdout; progress, warnings and errors on stderr."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kif_runtime.errors import KifError

Report = Callable[[int, int, str], None]
"""How long work tells how far it is: (done, total, what)."""

PLAIN_SECONDS = 10.0


def out() -> Console:
    """Results. Text is printed as it is: names and answers may hold what looks like markup."""
    return Console(markup=False, highlight=False, emoji=False, soft_wrap=True)


def err() -> Console:
    return Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)


def warn(message: str) -> None:
    err().print(f"kif: warning: {message}", style="yellow")


def to_json(value: dict[str, Any]) -> str:
    """Keys keep their order, letters of every script stay readable. Raises KifError where a number is not finite."""
    try:
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise KifError("the model gives numbers that are not finite; check it, or load it with another dtype") from None


def print_json(value: dict[str, Any]) -> None:
    print(to_json(value))


@contextmanager
def progress() -> Iterator[Report]:
    """A bar for each kind of work on a terminal; elsewhere a line when one begins and one every ten seconds.

    Both say how long the rest will take at the pace so far.
    """
    console = err()
    if not console.is_terminal:
        yield _plain_lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def _plain_lines(console: Console) -> Report:
    last: dict[str, float] = {}
    begun: dict[str, tuple[float, int]] = {}  # when the first word on it came, and how much was done then

    def report(done: int, total: int, what: str) -> None:
        now = time.monotonic()
        since, before = begun.setdefault(what, (now, done))
        if what not in last or now - last[what] > PLAIN_SECONDS:
            last[what] = now
            left = f", about {(now - since) * (total - done) / (done - before):.0f} s left" if done > before else ""
            console.print(f"{what}: {done} of {total}{left}")

    return report


@contextmanager
def working(what: str) -> Iterator[None]:
    """Something of unknown length is going on: a spinner on a terminal, a line elsewhere."""
    console = err()
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        console.print(what)
        yield


def show_log() -> None:
    """Let what the runtime reports, such as the first conversion of the embedded model, reach the user."""
    logger = logging.getLogger("kif_runtime")
    if not any(isinstance(handler, _ToConsole) for handler in logger.handlers):
        logger.addHandler(_ToConsole())
        logger.setLevel(logging.INFO)
        logger.propagate = False


class _ToConsole(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        err().print(record.getMessage(), style="dim")
