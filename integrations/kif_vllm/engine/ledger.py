"""Which capsules apply now, and which versions running requests still have: the engine core's word on both.

Requests are frozen in vLLM's input thread while changes are made in its busy loop, so everything is under one lock.
"""

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

from kif_runtime.capsule import Capsule
from kif_runtime.errors import RequestError

from ..sets import NOTHING, CapsuleSet, base_of, salt, version

UNKNOWN = "a capsule that this request names is not here, or not for this caller; ask for the ids you may use"
REMEMBERED = 4096  # requests whose sets can be told afterwards, as evidence


class Ledger:
    """mandatory: ids that apply to every request, or "all" of those there are."""

    def __init__(self, mandatory: Literal["all"] | Iterable[str]) -> None:
        self._lock = threading.RLock()
        self._rule = mandatory if mandatory == "all" else frozenset(mandatory)
        self._current: dict[str, str] = {}  # id → version
        self._bases: dict[str, tuple[str, ...]] = {"": ()}
        self._base = ""
        self._live: dict[str, CapsuleSet] = {}  # request id → its set, while anything holds the request
        self._remembered: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._released: deque[str] = deque()
        self._doomed: set[str] = set()
        self.generation = 0
        self._versions = lru_cache(maxsize=4096)(self._versions_of)

    def freeze(self, request: str, asked: Iterable[str]) -> CapsuleSet:
        """The set of a request that names `asked`, of the versions there are now, and in use from now on.

        Raises RequestError for an unknown id.
        """
        with self._lock:
            try:
                named = {self._current[id] for id in asked}
            except (KeyError, TypeError):
                raise RequestError(UNKNOWN) from None
            self._settle()  # here, so that on a server that nobody changes the past does not pile up
            chosen = CapsuleSet(self._base, tuple(sorted(named.difference(self._bases[self._base]))))
            self._live[request] = chosen
            self._remembered[request] = self.versions(chosen)
            while len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
            return chosen

    def applied(self, request: str) -> tuple[str, ...]:
        """The versions that one of the last requests was frozen with; none for an older one."""
        with self._lock:
            return self._remembered.get(request, ())

    def release(self, request: str) -> None:
        """The set of this request is not in use any more. May be called at any moment, in any thread."""
        self._released.append(request)

    def release_with(self, request: Any) -> None:
        """Release when vLLM's request object is gone: then nobody can schedule it any more, whatever way it ended."""
        weakref.finalize(request, self.release, request.request_id).atexit = False

    def doom(self, requests: Iterable[str]) -> None:
        """These were frozen, and are to be aborted, but have not reached the scheduler yet."""
        with self._lock:
            self._doomed.update(requests)

    def is_doomed(self, request: str) -> bool:
        return request in self._doomed

    def salt(self, chosen: CapsuleSet, user_salt: str | None) -> str | None:
        """What keys the KV of this set's requests: the user's own salt where the set is empty."""
        return user_salt if chosen == NOTHING else salt(user_salt, self.versions(chosen))

    def versions(self, chosen: CapsuleSet) -> tuple[str, ...]:
        """All versions in a set, sorted."""
        with self._lock:
            return self._versions(chosen)

    def preview(
        self, load: Iterable[Capsule] = (), unload: Iterable[str] = ()
    ) -> tuple[dict[str, str], str, tuple[str, ...]]:
        """What a change would make of it: (id → version, base, the base's versions). Raises RequestError."""
        with self._lock:
            current = dict(self._current)
        for id in unload:
            if current.pop(id, None) is None:
                raise RequestError(f"no capsule {id!r} is loaded; the list of capsules says which are")
        current |= {capsule.id: version(capsule.id, capsule.digest) for capsule in load}
        versions = tuple(sorted(v for id, v in current.items() if self._is_mandatory(id)))
        return current, base_of(versions), versions

    def commit(self, current: dict[str, str], base: str, versions: tuple[str, ...]) -> None:
        """From here on requests are frozen under this."""
        with self._lock:
            self._bases[base] = versions
            self._current, self._base = current, base
            self.generation += 1

    def touched_by(self, versions: Iterable[str]) -> list[str]:
        """Requests whose set is not what it would be now, in the mandatory part or in `versions`."""
        changed = set(versions)
        with self._lock:
            self._settle()
            return [
                request for request, chosen in self._live.items()
                if chosen.base != self._base or changed.intersection(chosen.extra)
            ]  # fmt: skip

    def retire(self, held: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(versions of `held`, bases) that no request has and none will get. They are forgotten here at once."""
        with self._lock:
            self._settle()
            alive = set(self._live.values())
            bases = {chosen.base for chosen in alive} | {self._base, ""}
            used = set(self._current.values())
            for chosen in alive:
                used.update(self._bases[chosen.base], chosen.extra)
            gone = tuple(base for base in self._bases if base not in bases)
            for base in gone:
                del self._bases[base]
            self._versions.cache_clear()
            return tuple(sorted(set(held) - used)), gone

    def knows_base(self, base: str) -> bool:
        with self._lock:
            return base in self._bases

    @property
    def current(self) -> dict[str, str]:
        """Id → version of what new requests may name."""
        with self._lock:
            return dict(self._current)

    @property
    def mandatory(self) -> list[str]:
        with self._lock:
            return sorted(id for id in self._current if self._is_mandatory(id))

    def is_named(self, id: str) -> bool:
        """Whether the configuration makes this very id mandatory."""
        return self._rule != "all" and id in self._rule

    @property
    def live(self) -> int:
        """How many requests there are."""
        with self._lock:
            self._settle()
            return len(self._live)

    def _settle(self) -> None:
        while self._released:
            request = self._released.popleft()
            self._live.pop(request, None)
            self._doomed.discard(request)

    def _is_mandatory(self, id: str) -> bool:
        return self._rule == "all" or self.is_named(id)

    def _versions_of(self, chosen: CapsuleSet) -> tuple[str, ...]:
        return tuple(sorted((*self._bases[chosen.base], *chosen.extra)))
