"""A request's capsule set, as it is frozen when the request enters the engine: plain data, sent to the workers."""

import hashlib
import json
from collections.abc import Iterable
from typing import NamedTuple

# Part of every salt: a change of what the operator computes must not meet KV that the old one wrote.
OP_VERSION = 1
KEY = "kif"  # in vllm_xargs, where a client names capsules, and in the frozen request's extra_args


class CapsuleSet(NamedTuple):
    """The versions that apply to one request: the mandatory ones of a moment, and what the request named besides.

    base: the mandatory versions' own digest, which stands for them (a thousand names need not travel with each
    request); empty for none. extra: versions named besides, sorted, none of them in the base.
    """

    base: str = ""
    extra: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self != NOTHING


NOTHING = CapsuleSet()


def version(id: str, digest: str) -> str:
    """A capsule's content under its id. '+' sorts before all that an id may hold, so versions sort as ids do."""
    return f"{id}+{digest}"


def id_of(version: str) -> str:
    return version.rpartition("+")[0]


def digest_of(version: str) -> str:
    return version.rpartition("+")[2]


def base_of(versions: Iterable[str]) -> str:
    """What stands for these mandatory versions: 64 hex digits, or nothing for none."""
    found = sorted(versions)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest() if found else ""


def salt(user_salt: str | None, versions: Iterable[str]) -> str:
    """The cache salt of a non-empty set: 64 hex digits.

    It depends on content alone, so that equal sets share KV, on every server, and any other set does not.
    """
    content = [user_salt, sorted(map(digest_of, versions)), OP_VERSION]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
