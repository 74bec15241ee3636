"""What a worker holds: the bank, the sites in its model, the running batch, and the counts."""

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kif_runtime.bank import CapsuleBank
from kif_runtime.capsule import Capsule
from kif_runtime.errors import RequestError

from ..sets import NOTHING, CapsuleSet, digest_of, version
from .batch import Batch
from .site import Site
from .tally import Tally


@dataclass(frozen=True)
class Room:
    """What is allocated at start-up. signatures: at each site, and of one set there, so that a GPU lists candidates
    first where they are over 64; sets: capsule sets in one batch; requests: those remembered for evidence.
    """

    width: int
    blocks: int
    fingerprint: str
    sites: tuple[int, ...]
    capsules: int
    signatures: int
    rank: int
    sets: int
    requests: int
    max_tokens: int


@dataclass(frozen=True)
class Change:
    """New capsules and new bases come first, then `drop` leaves; a base is (its digest, its versions)."""

    add: tuple[Capsule, ...] = ()
    bases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    drop: tuple[str, ...] = ()
    drop_bases: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Row:
    """A row of the bank, -1 for none, and the sites at which its set has signatures."""

    number: int
    sites: frozenset[int]


NO_ROW = Row(-1, frozenset())


class Suppression:
    """The bank holds *versions*: a capsule's content under the id `sets.version` gives it, so that two may be there.

    Sets become rows of the bank when a batch needs them, and stay until their rows are needed for others.
    """

    def __init__(self, room: Room, device: torch.device) -> None:
        self.room = room
        self.bank = CapsuleBank(
            width=room.width, sites=room.sites, max_signatures=room.signatures, max_rank=room.rank,
            max_capsules=room.capsules, max_sets=room.sets, device=device, fingerprint=room.fingerprint,
        )  # fmt: skip
        self.batch = Batch(room.max_tokens, room.capsules, map(self.bank.site, room.sites), device)
        self.tally = Tally(room.requests, room.capsules, device)
        self.sites: dict[int, Site] = {}
        self.warming = False  # between `install` and `serve`, while vLLM sends requests of its own through the model
        self._bases: dict[str, tuple[str, ...]] = {"": ()}
        self._rows: OrderedDict[CapsuleSet, Row] = OrderedDict()
        self._may_skip = device.type == "cpu"  # on a GPU a graph may be recorded, for other batches than this one
        self._running: list[str] = []
        self._gone: dict[str, int] = {}

    def apply(self, change: Change) -> None:
        """All of `change`, or a BankError and nothing of it."""
        self.bank.add(*(replace(capsule, id=version(capsule.id, capsule.digest)) for capsule in change.add))
        self._bases |= dict(change.bases)
        self.end()
        self._forget(change)
        for name in change.drop:
            digest, column = digest_of(name), self.bank.index(name)
            self._gone[digest] = self._gone.get(digest, 0) + self.tally.forget_column(column)
            self.bank.remove(name)
        for base in change.drop_bases:
            del self._bases[base]

    def begin(self, requests: list[str], sets: list[Any], starts: Tensor, tokens: int) -> None:
        """A forward is about to run over `tokens` tokens; request i has those from starts[i] to starts[i + 1].

        Raises RequestError for a request whose set is none that the engine froze.
        """
        if self.warming:
            return self.idle()  # the proof, which comes after it, would see if this were never over
        self.end()
        if any(type(chosen) is not CapsuleSet for chosen in sets):
            raise RequestError("a request reached the model without a frozen capsule set; nothing is computed for it")
        needed = dict.fromkeys(sets)
        rows = {chosen: self._row(chosen, needed) for chosen in needed}
        self.batch.begin([rows[chosen].number for chosen in sets], starts, tokens)
        for block, site in self.sites.items():
            site.needed = not self._may_skip or any(block in row.sites for row in rows.values())
        self._running = requests

    def end(self) -> None:
        """The forward, if there was one since `begin`, is done: count what fired."""
        if self._running:
            tokens = self.batch.tokens
            self.tally.add(self.batch.hits[:tokens], self.batch.owner[:tokens], self._running)
        self._running = []

    def idle(self) -> None:
        """A dummy run is about to happen: its tokens belong to nobody."""
        self.end()
        self.batch.clear()

    def row_of(self, chosen: CapsuleSet) -> int | None:
        """The bank's row of a set that a batch has had lately, -1 for the empty set; None for others."""
        row = NO_ROW if chosen == NOTHING else self._rows.get(chosen)
        return None if row is None else row.number

    def evidence(self, request: str) -> dict[str, int] | None:
        """Version → tokens on which it fired, of one request."""
        self.end()
        fired = self.tally.of(request)
        if fired is None:
            return None
        counts = fired.tolist()
        return {name: counts[self.bank.index(name)] for name in self.bank.capsules if counts[self.bank.index(name)]}

    def figures(self) -> dict[str, Any]:
        """Counts since the start; `capsules`: tokens on which each fired, by content digest."""
        self.end()
        totals, capsules = self.tally.total.tolist(), dict(self._gone)
        for name in self.bank.capsules:
            digest = digest_of(name)
            capsules[digest] = capsules.get(digest, 0) + totals[self.bank.index(name)]
        gate = sum(site.seconds for site in self.sites.values())
        return self.tally.figures() | {"gate_seconds": gate, "capsules": capsules}

    def _row(self, chosen: CapsuleSet, needed: Container[CapsuleSet]) -> Row:
        if chosen == NOTHING:
            return NO_ROW
        if chosen not in self._rows:
            if len(self._rows) >= self.room.sets:
                oldest = next(other for other in self._rows if other not in needed)
                self.bank.release(self._rows.pop(oldest).number)
            number = self.bank.row((*self._bases[chosen.base], *chosen.extra))
            there = (site for site in self.room.sites if bool((self.bank.site(site).sets[number] >= 0).any()))
            self._rows[chosen] = Row(number, frozenset(there))
        self._rows.move_to_end(chosen)
        return self._rows[chosen]

    def _forget(self, change: Change) -> None:
        """Give back the rows of sets that hold what is to be dropped; no request has them any more."""
        dropped, bases = set(change.drop), set(change.drop_bases)
        for chosen in list(self._rows):
            versions = (*self._bases[chosen.base], *chosen.extra)
            if chosen.base in bases or dropped.intersection(versions):
                self.bank.release(self._rows.pop(chosen).number)
