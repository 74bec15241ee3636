"""What the measuring scripts share: options, mined capsules kept in a folder, journals that survive a kill, tables."""

import argparse
import hashlib
import json
import os
import platform
import re
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import kif_runtime
from kif_runtime import Capsule, KifError, load_model
from kif_runtime.files import atomic_write
from kif_runtime.fingerprint import fingerprint
from kif_runtime.ids import slug
from kif_runtime.models import cache_folder


def parser(description: str, *, facts: bool = True) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if facts:
        options.add_argument("--facts", type=Path, required=True, help="JSON lines: subject, prompt, answer, …")
    options.add_argument("--model", default="embedded", help="a folder, a hub id, or embedded (default)")
    options.add_argument("--method", default="fisher", help="how to mine (default: fisher)")
    options.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="another option of mine()")
    options.add_argument("--own-text", type=Path, metavar="FILE", help="mine with this text as the user's own")
    options.add_argument("--own-lines", type=int, metavar="N", help="this many of its lines (default: all)")
    options.add_argument("--capsules", type=Path, help="where mined capsules are kept (default: the cache folder)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", type=Path, metavar="OUT", help="also write everything measured to this file")
    return options


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(main: Any) -> None:
    """Bad input is one line and exit code 2."""
    try:
        main()
    except KifError as problem:
        say(f"error: {problem}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted; run it again and it goes on from here")
        sys.exit(130)


@dataclass
class Mined:
    """One subject's capsule, or why there is none. seconds: how long mining took, None where it was not recorded."""

    subject: str
    capsule: Capsule | None
    seconds: float | None
    error: str | None = None


class Mine:
    """Mines a subject once and keeps its capsule. The folder's name changes with the model and with the mining code."""

    def __init__(self, model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.options = {"method": options.method} | dict(_option(text) for text in options.option)
        if options.own_text:
            lines = read_text(options.own_text).splitlines()
            self.options["passages"] = [line.strip() for line in lines if line.strip()][: options.own_lines]
        self.folder = options.capsules or self._default_folder()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._journal = Journal(self.folder / "mined.jsonl")

    def _default_folder(self) -> Path:
        settings = [fingerprint(self.model), mining_code(), self.options]
        return cache_folder() / "bench" / digest(settings)

    def prepare(self) -> None:
        """The once-per-model part, so that it does not count as the first subject's."""
        from kif_runtime.mining import prepare

        start = time.perf_counter()
        passages = self.options.get("passages", ())
        prepare(self.model, self.tokenizer, passages=passages, progress=progress("preparing"))
        say(f"prepared in {time.perf_counter() - start:.1f} s")

    def __call__(self, subject: str) -> Mined:
        id = capsule_id(subject)
        path, known = self.folder / f"{id}.kif.safetensors", self._journal.rows.get(id, {})
        if path.is_file():
            return Mined(subject, Capsule.load(path), known.get("seconds"))
        if known.get("error"):
            return Mined(subject, None, None, known["error"])
        start = time.perf_counter()
        try:
            capsule = kif_runtime.mine(self.model, self.tokenizer, subject, id=id, **self.options)
        except KifError as problem:
            self._journal.append(id, {"subject": subject, "error": str(problem)})
            return Mined(subject, None, None, str(problem))
        seconds = time.perf_counter() - start
        capsule.save(path)
        self._journal.append(id, {"subject": subject, "seconds": seconds, "bytes": capsule.nbytes})
        return Mined(subject, capsule, seconds)

    def all(self, subjects: Sequence[str]) -> list[Mined]:
        self.prepare()
        found = []
        for number, subject in enumerate(subjects, 1):
            found.append(self(subject))
            if number % 10 == 0 or number == len(subjects):
                say(f"mined {number} of {len(subjects)}")
        for mined in found:
            if mined.error:
                say(f"not mined: {mined.subject}: {mined.error}")
        return found


def capsule_id(subject: str) -> str:
    """Readable, and never the same for two names."""
    return f"{slug(subject)[:80]}-{zlib.crc32(subject.encode()):08x}"


def mining_code() -> str:
    """Changes whenever the code or data that make capsules do."""
    folder = Path(kif_runtime.__file__).parent / "mining"
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc")
    return hashlib.sha256(b"\0".join(p.read_bytes() for p in files)).hexdigest()


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise KifError(f"--option {text!r} is not NAME=JSON, as in --option false_positive_rate=1e-4") from None


@dataclass
class Journal:
    """Rows by key in a JSON lines file, one appended at a time. A line cut off by a kill is dropped."""

    path: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for line in whole.splitlines():
            row = json.loads(line)
            self.rows[row.pop("key")] = row

    def append(self, key: str, row: dict[str, Any]) -> None:
        line = json.dumps({"key": key} | row).encode() + b"\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)
        self.rows[key] = json.loads(line)


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    model, tokenizer = load_model(options.model)
    torch.set_grad_enabled(False)
    return model, tokenizer


def read_text(path: Path) -> str:
    """A text file; the word-level WikiText files get their punctuation back in place."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise KifError(f"cannot read {path}: {failure}") from None
    if " @-@ " not in text:
        return text
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r"(?<=\() | (?=\)|'s\b)", "", text)
    text = re.sub(r" ([,.;:!?%])(?=\s)", r"\1", text)
    return text


def progress(title: str, every: float = 15.0) -> Any:
    """A callback that says how far it is, now and then."""
    last = [time.monotonic()]

    def tell(done: int, total: int, what: str = "") -> None:
        if time.monotonic() - last[0] > every:
            last[0] = time.monotonic()
            say(f"{title} {what}: {done} of {total}")

    return tell


def machine() -> dict[str, Any]:
    return {
        "kif": kif_runtime.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def write_json(path: Path | None, value: dict[str, Any]) -> None:
    if path is not None:
        atomic_write(path, json.dumps({"machine": machine()} | value, indent=1, ensure_ascii=False).encode())
        say(f"wrote {path}")


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table in plain text: the first column to the left, the others to the right."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    print(f"\n{title}")
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"
    return str(value)


def interval(found: dict[str, Any], name: str = "interval") -> str:
    return "-" if found.get(name) is None else "[{}, {}]".format(*map(_cell, found[name]))


def mean(values: Iterable[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None
