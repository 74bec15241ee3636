"""The directory of capsules: read, checked against the served model, never left by a path."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kif_runtime.capsule import Capsule
from kif_runtime.errors import CapsuleError, KifError
from kif_runtime.files import shown

SUFFIX = ".kif.safetensors"


@dataclass(frozen=True)
class Served:
    """What a capsule must fit: the model's fingerprint, its width and its number of blocks."""

    fingerprint: str
    width: int
    blocks: int

    def check(self, capsule: Capsule) -> None:
        """Raise CapsuleError unless `capsule` is for this model."""
        if (capsule.width, capsule.blocks) != (self.width, self.blocks):
            raise CapsuleError(
                f"made for width {capsule.width} and {capsule.blocks} blocks, the served model has {self.width} and "
                f"{self.blocks}; mine the subject on this model"
            )
        capsule.check_model(self.fingerprint)


Stamp = tuple[int, int, int]


class Found(NamedTuple):
    """A new or changed file of the directory."""

    name: str
    stamp: Stamp
    capsule: Capsule


class Library:
    """`folder` holds capsules as `NAME.kif.safetensors`; the id is in the file, and two files may not share one."""

    def __init__(self, folder: Path, served: Served) -> None:
        self.folder, self.served = folder, served
        self._seen: dict[str, tuple[Stamp, str | None]] = {}  # file name → (its state, the id it holds)
        self._postponed: dict[str, Stamp] = {}

    def names(self) -> list[str]:
        """Names of the capsule files there are now. Hidden and temporary files are not among them."""
        try:
            with os.scandir(self.folder) as entries:
                return sorted(e.name for e in entries if e.name.endswith(SUFFIX) and not e.name.startswith("."))
        except OSError as failure:
            raise KifError(f"cannot read the capsule directory: {failure.strerror}; is it still there?") from None

    def read(self, name: str) -> Capsule:
        """The capsule in the file `name` of the directory. Raises CapsuleError."""
        if name != os.path.basename(name) or not name.endswith(SUFFIX) or name.startswith(".") or "\0" in name:
            raise CapsuleError(f"a capsule is loaded by the name of a {SUFFIX} file in the server's directory, no path")
        path = self.folder / name
        if path.is_symlink() and path.resolve().parent != self.folder.resolve():
            raise CapsuleError(f"{name} is a link that leads out of the server's directory; copy the file there")
        capsule = Capsule.load(path)
        try:
            self.served.check(capsule)
        except CapsuleError as problem:
            raise CapsuleError(f"{name}: {problem}") from None
        return capsule

    def read_all(self) -> list[Capsule]:
        """All capsules. Raises CapsuleError for the first that is bad, or where two have one id: nothing is skipped."""
        found: dict[str, tuple[str, Capsule]] = {}
        for name in self.names():
            stamp, capsule = self._stamp(name), self.read(name)
            if capsule.id in found:
                raise CapsuleError(f"{found[capsule.id][0]} and {name} hold capsules of one id; keep one of them")
            found[capsule.id] = (name, capsule)
            self._seen[name] = (stamp, capsule.id)
        return [capsule for _, capsule in found.values()]

    def changes(self) -> tuple[list[Found], list[str], list[str]]:
        """(new or changed files, ids whose files are gone, one line per bad file); the first two until `keep` and
        `forget` are called.

        A bad file is reported once, and looked at again when it changes; what it held before stays. The lines go to the
        server's log, and a file's name may be that of a subject, so they tell its place among the names instead.
        """
        load, problems = [], []
        names = self.names()
        seen = dict(self._seen)  # as it will be if all goes well
        for name in names:
            stamp, known = self._stamp(name), seen.get(name)
            if known is not None and known[0] == stamp:
                continue
            id = known[1] if known else None
            try:
                capsule = self.read(name)
                others = [n for n, (_, held) in seen.items() if held == capsule.id and n != name and n in names]
                if others:
                    raise CapsuleError(f"{name} and {others[0]} hold capsules of one id; keep one of them")
                load.append(Found(name, stamp, capsule))
                id = capsule.id
            except CapsuleError as problem:
                problems.append(self._unnamed(str(problem), names))
                self._seen[name] = (stamp, id)
            seen[name] = (stamp, id)
        there = {held for name, (_, held) in seen.items() if name in names}
        gone = {held for name, (_, held) in seen.items() if name not in names and held is not None}
        return load, sorted(gone - there), problems

    def keep(self, found: Found) -> None:
        """This file is done with until it changes: its capsule is loaded, or never will be."""
        self.forget(found.capsule.id)
        self._seen[found.name] = (found.stamp, found.capsule.id)
        self._postponed.pop(found.name, None)

    def forget(self, id: str) -> None:
        """No file holds this id, and what that meant was done."""
        self._seen = {name: state for name, state in self._seen.items() if state[1] != id}

    def postpone(self, found: Found) -> bool:
        """This file is tried again at the next look. Gives whether that is news."""
        news = self._postponed.get(found.name) != found.stamp
        self._postponed[found.name] = found.stamp
        return news

    def _unnamed(self, text: str, names: list[str]) -> str:
        for name in sorted(names, key=len, reverse=True):  # one may be the end of another
            place = f"file {names.index(name) + 1} of the {len(names)} that end in {SUFFIX}, by name"
            text = text.replace(shown(self.folder / name), place).replace(name, place)
        return text

    def _stamp(self, name: str) -> Stamp:
        try:
            status = os.stat(self.folder / name)
            return status.st_mtime_ns, status.st_size, status.st_ino
        except OSError:
            return 0, 0, 0


def served_model(name: str, base: str | None, width: int, blocks: int, revision: str | None = None) -> Served:
    """What the capsules of a server must fit: the model `name`, a folder or hub id, with its revision.

    base: the checkpoint that capsules were mined on, if it is another. Raises KifError where neither can be read.
    """
    from kif_runtime.fingerprint import checkpoint_fingerprint

    return Served(checkpoint_fingerprint(_local(base) if base else _local(name, revision)), width, blocks)


def _local(name: str, revision: str | None = None) -> Path:
    """The folder of a model that vLLM has loaded, by path or hub id."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError) as problem:
        raise KifError(f"cannot find the checkpoint of {name!r} on this machine to identify it: {problem}") from None
