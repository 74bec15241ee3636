"""`--additional-config '{"kif": {...}}'`: what a server is told about KIF. Anything unknown is an error."""

import json
import os
from collections.abc import Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from kif_runtime.errors import KifError
from kif_runtime.files import shown

ADMIN_KEY = "KIF_ADMIN_KEY"  # in the environment: vLLM logs its configuration
REQUIRED = "KIF_REQUIRED"  # set by `kif serve`: a server that lost its kif table on the way must not serve


class ConfigError(KifError):
    """The server's KIF configuration is not acceptable."""


@dataclass(frozen=True)
class KifConfig:
    """capsules: the directory that capsules are read from, at start and later. All else has a default.

    mandatory: "all", or the ids that apply to every request. sites: blocks at which capsules may have signatures; by
    default where mining puts them, and where the directory's have theirs at start. max_capsules, max_signatures (per
    site), max_rank: room, fixed at start; by default twice what the directory holds, and at least 256, 256 and 4.
    max_named: ids that one request may name. allow: a JSON file, {"sha256 of an API key, hex": [ids]}, "*" for other
    callers; without it everybody may name every capsule. base: folder or hub id of the checkpoint that capsules were
    mined on, where the served one is a quantised copy of it. watch: seconds between looks at the directory, 0 for
    none. audit: a file that admin acts are appended to. prompt_embeds, multimodal: let such input in, where names
    cannot be recognised. capsule_metrics: a metric series per capsule, labelled by its digest.
    """

    capsules: Path
    mandatory: Literal["all"] | tuple[str, ...] = "all"
    sites: tuple[int, ...] | None = None
    max_capsules: int | None = None
    max_signatures: int | None = None
    max_rank: int | None = None
    max_named: int = 64
    allow: Path | None = None
    base: str | None = None
    watch: float = 1.0
    audit: Path | None = None
    prompt_embeds: bool = False
    multimodal: bool = False
    capsule_metrics: bool = False

    @classmethod
    def of(cls, vllm_config: Any) -> Self | None:
        """The `kif` entry of a server's configuration, None where there is none.

        Raises ConfigError, also where there is none though `kif serve` has started the server.
        """
        additional = getattr(vllm_config, "additional_config", None)
        if not isinstance(additional, dict) or "kif" not in additional:
            if os.environ.get(REQUIRED):
                raise ConfigError(
                    "kif serve started this server, but no kif table reached it; look for another additional-config "
                    "among vLLM's flags and in the file of --config, and take it out"
                )
            return None
        return cls.parse(additional["kif"])

    @classmethod
    def parse(cls, content: Any) -> Self:
        """Raises ConfigError, in one line, for the first thing that is not as described."""
        if not isinstance(content, dict):
            raise ConfigError('"kif" in --additional-config is no table; write {"kif": {"capsules": "DIR"}}')
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(content) - known):
            raise ConfigError(f"unknown key {shown(unknown[0], 60)!r} in the kif configuration; known: {sorted(known)}")
        if "capsules" not in content:
            raise ConfigError('the kif configuration names no directory; write {"kif": {"capsules": "DIR"}}')
        return cls(**{name: _READ[name](name, value) for name, value in content.items() if value is not None})

    def check_mandatory(self, ids: Set[str]) -> None:
        """Raise ConfigError unless every id that is to be mandatory is among `ids`, those of the directory."""
        if self.mandatory != "all" and (missing := sorted(set(self.mandatory) - ids)):
            raise ConfigError(
                f"{len(missing)} mandatory capsules are not in the directory, {missing[0]!r} first; put them there"
            )


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"kif configuration: {name} is not a path; write it as a text")
    path = Path(value).expanduser()
    if not path.is_absolute():
        path = Path.cwd() / path
    if name == "capsules" and not path.is_dir():
        raise ConfigError(f"kif configuration: {shown(path)} is no directory; make it, or name another as capsules")
    return path


def _ids(name: str, value: Any) -> Any:
    if value == "all":
        return value
    if not isinstance(value, list) or not all(isinstance(id, str) and id for id in value):
        raise ConfigError(f'kif configuration: {name} is neither "all" nor a list of capsule ids')
    return tuple(dict.fromkeys(value))


def _blocks(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(v) is int and v >= 0 for v in value):
        raise ConfigError(f"kif configuration: {name} is not a list of block numbers, counted from 0")
    return tuple(sorted(set(value)))


def _count(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 1_000_000:
        raise ConfigError(f"kif configuration: {name} is not a whole number from 1 to 1,000,000")
    return value


def _seconds(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 3600:
        raise ConfigError(f"kif configuration: {name} is not a number of seconds from 0 to 3600")
    return float(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"kif configuration: {name} is not a text")
    return value


def _switch(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ConfigError(f"kif configuration: {name} is neither true nor false")
    return value


_READ = {
    "capsules": _path, "mandatory": _ids, "sites": _blocks, "max_capsules": _count, "max_signatures": _count,
    "max_rank": _count, "max_named": _count, "allow": _path, "base": _text, "watch": _seconds, "audit": _path,
    "prompt_embeds": _switch, "multimodal": _switch, "capsule_metrics": _switch,
}  # fmt: skip


def read_allowed(path: Path) -> dict[str, frozenset[str]]:
    """The allow-list file: {"sha256 of an API key, or *": [ids]}. Raises ConfigError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ConfigError(f"cannot read the allow-list {shown(path)}: {problem}; write a JSON table") from None
    if not isinstance(content, dict):
        raise ConfigError(f"the allow-list {shown(path)} is no table of key digests")
    for key, ids in content.items():
        hexadecimal = len(key) == 64 and all(c in "0123456789abcdef" for c in key)
        if not (hexadecimal or key == "*") or not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
            raise ConfigError(f"the allow-list {shown(path)}: each entry is a SHA-256 in hex, or *, and a list of ids")
    return {key: frozenset(ids) for key, ids in content.items()}


def admin_key() -> str | None:
    """The key of the admin routes, from the environment; None, and no routes, where none is set."""
    return os.environ.get(ADMIN_KEY) or None
