"""A bank: capsules packed into fixed-address tensors for one model on one device; all capacity is allocated at once."""

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Self

import torch

from kif_kernels import SiteTensors

from .calibration import recall_at, shift_for_rate
from .capsule import Capsule
from .errors import BankError, CapsuleError, KifError, RequestError
from .packing import PackedSite


class CapsuleBank:
    """Capsules of one model, ready to be applied. Not thread-safe: whoever shares a bank locks it.

    width: D. sites: block indices that may hold signatures. max_signatures: slots at each site, one number or one per
    site. max_rank, max_capsules: the largest basis and how many capsules. max_sets: capsule sets in use at once.
    max_set_signatures: signatures of one set at one site (default: as many as the site holds). dtype: of the bases.
    max_false_fire: share of tokens on which any signature held may fire; each gets an equal part, and its bias is
    lowered where its stored calibration says that it fires more often. With it, adding and removing moves other
    capsules' thresholds. fingerprint: the model's; by default that of the first capsule added.
    Raises BankError where a number is not at least 1 (max_false_fire: outside (0, 1]).
    """

    def __init__(
        self,
        *,
        width: int,
        sites: Iterable[int],
        max_signatures: int | Mapping[int, int],
        max_rank: int = 16,
        max_capsules: int,
        max_sets: int,
        max_set_signatures: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_false_fire: float | None = None,
        fingerprint: str | None = None,
    ) -> None:
        at_site = {
            block: max_signatures if isinstance(max_signatures, int) else max_signatures.get(block, 1)
            for block in sorted(set(sites))
        }
        limits = {"width": width, "max_rank": max_rank, "max_capsules": max_capsules, "max_sets": max_sets}
        limits |= {"max_set_signatures": max_set_signatures or 1, "max_signatures": min(at_site.values(), default=1)}
        for name, value in limits.items():
            if value < 1:
                raise BankError(f"{name} is {value}; a bank needs at least 1")
        if max_false_fire is not None and not 0 < max_false_fire <= 1:
            raise BankError(f"max_false_fire is {max_false_fire}; it is a share of tokens, over 0 and at most 1")
        self.width, self.max_rank, self.max_capsules, self.max_sets = width, max_rank, max_capsules, max_sets
        self.max_false_fire, self.fingerprint = max_false_fire, fingerprint
        self._capsules: dict[str, Capsule] = {}
        self._indices: dict[str, int] = {}
        self._mandatory: frozenset[str] = frozenset()
        self._rows: dict[int, frozenset[str]] = {}
        self._references: dict[int, int] = {}
        with torch.inference_mode(False):  # tensors made in inference mode could not be changed outside it
            self._sites = {
                block: PackedSite(
                    SiteTensors.empty(
                        width=width, signatures=slots, rank=max_rank, rows=max_sets,
                        set_length=min(max_set_signatures or slots, slots), device=device, dtype=dtype,
                    )
                )
                for block, slots in at_site.items()
            }  # fmt: skip

    @classmethod
    def for_capsules(
        cls,
        capsules: Iterable[Capsule],
        *,
        mandatory: Iterable[str] = (),
        width: int | None = None,
        max_sets: int = 64,
        **options: Any,
    ) -> Self:
        """A bank with just the room that `capsules` need, holding them. `width` matters only where there are none."""
        capsules = tuple(capsules)
        if not capsules and width is None:
            raise BankError("a bank for no capsules needs the model's width; pass width=")
        sites = [s.site for c in capsules for s in c.signatures]
        sizes: dict[str, Any] = {
            "width": capsules[0].width if width is None else width,
            "sites": sites,
            "max_signatures": Counter(sites),
            "max_rank": max((s.rank for c in capsules for s in c.signatures), default=1),
            "max_capsules": max(1, len(capsules)),
        }
        bank = cls(max_sets=max_sets, **sizes | options)
        bank.add(*capsules)
        bank.set_mandatory(mandatory)
        return bank

    @property
    def capsules(self) -> Mapping[str, Capsule]:
        """The capsules held, by id (read-only)."""
        return MappingProxyType(self._capsules)

    @property
    def mandatory(self) -> frozenset[str]:
        return self._mandatory

    @property
    def sites(self) -> tuple[int, ...]:
        return tuple(self._sites)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whether or not they are in use."""
        return sum(s.tensors.nbytes for s in self._sites.values())

    def site(self, block: int) -> SiteTensors:
        """The tensors of a site: the same object, at the same addresses, for the bank's life."""
        if block not in self._sites:
            raise BankError(f"block {block} is no site of this bank; its sites are {list(self._sites)}")
        return self._sites[block].tensors

    def index(self, id: str) -> int:
        """The capsule's column in `hits`. It stays while the capsule is held, and is given to another later."""
        return self._indices[self._known(id)]

    def add(self, *capsules: Capsule) -> None:
        """Take capsules in: all of them, or none and a BankError that names the limit or what does not fit."""
        self._check_new(capsules)
        held = [*self._capsules.values(), *capsules]
        biases = self._biases(held)
        free = sorted(set(range(self.max_capsules)) - set(self._indices.values()))
        for capsule, index in zip(capsules, free, strict=False):
            self._capsules[capsule.id], self._indices[capsule.id] = capsule, index
            for number, signature in enumerate(capsule.signatures):
                self._sites[signature.site].put((capsule.id, number), index, signature)
        self.fingerprint = self.fingerprint or (held[0].model if held else None)
        self._set_biases(biases)

    def remove(self, id: str) -> None:
        """Let a capsule go. Refused while it is mandatory or part of a capsule set in use."""
        self._known(id)
        if id in self._mandatory:
            raise BankError(f"capsule {id!r} is mandatory; take it out of the mandatory set first")
        users = sum(id in ids for ids in self._rows.values())
        if users:
            raise BankError(f"capsule {id!r} is part of {users} capsule sets in use; release their rows first")
        biases = self._biases([c for c in self._capsules.values() if c.id != id])
        del self._capsules[id], self._indices[id]
        for site in self._sites.values():
            site.drop(id)
            for row, ids in self._rows.items():
                site.write_set(row, ids)
        self._set_biases(biases)

    def set_mandatory(self, ids: Iterable[str]) -> None:
        """Make `ids` part of every capsule set from now on.

        A set in use never changes, so this is refused while one lacks a capsule that would become mandatory.
        """
        wanted = frozenset(self._known(id) for id in _listed(ids))
        outside = sum(not wanted <= ids for ids in self._rows.values())
        if outside:
            raise BankError(
                f"{outside} capsule sets in use lack a capsule that would become mandatory; release their rows first"
            )
        self._mandatory = wanted

    def row(self, ids: Iterable[str] = ()) -> int:
        """The row of the capsule set mandatory ∪ `ids`; the same set has the same row. Give it back with `release`.

        Raises RequestError for an unknown id, BankError where `max_sets` or `max_set_signatures` is reached.
        """
        wanted = self._mandatory.union(self._known(id, RequestError) for id in _listed(ids))
        row = next((row for row, there in self._rows.items() if there == wanted), None)
        if row is None:
            row = self._new_row(wanted)
        self._references[row] += 1
        return row

    def release(self, row: int) -> None:
        """Give a row back, once for each `row()` that returned it. After the last it is free for another set."""
        if row not in self._rows:
            raise BankError(f"row {row} is not in use")
        self._references[row] -= 1
        if self._references[row] == 0:
            del self._rows[row], self._references[row]
            for site in self._sites.values():
                site.write_set(row, ())

    def report(self) -> dict[str, dict[str, Any]]:
        """Per capsule id: bytes, signatures, and for each signature how far its bias was lowered (`shifts`), the recall
        that is left and the recall that this cost (None where the capsule stores no positives).
        """
        held = sum(len(c.signatures) for c in self._capsules.values())
        result = {}
        for id, capsule in self._capsules.items():
            shifts = [self._shift(capsule, n, held) for n in range(len(capsule.signatures))]
            before = [recall_at(s.calibration, 0.0) for s in capsule.signatures]
            after = [recall_at(s.calibration, shift) for s, shift in zip(capsule.signatures, shifts, strict=True)]
            result[id] = {
                "bytes": capsule.nbytes,
                "signatures": len(capsule.signatures),
                "shifts": shifts,
                "recall": after,
                "recall_lost": [None if a is None or b is None else b - a for a, b in zip(after, before, strict=True)],
            }
        return result

    def _known(self, id: str, error: type[KifError] = BankError) -> str:
        if id not in self._capsules:
            raise error(f"capsule {id!r} is not in the bank ({len(self._capsules)} are); add it first or check the id")
        return id

    def _new_row(self, ids: frozenset[str]) -> int:
        row = next((r for r in range(self.max_sets) if r not in self._rows), None)
        if row is None:
            raise BankError(
                f"all {self.max_sets} capsule sets are in use (max_sets); release one or make a larger bank"
            )
        for block, site in self._sites.items():
            needed, room = len(site.slots(ids)), site.tensors.sets.shape[1]
            if needed > room:
                raise BankError(
                    f"the capsule set has {needed} signatures at block {block}, room is for {room} (max_set_signatures)"
                )
        for site in self._sites.values():
            site.write_set(row, ids)
        self._rows[row], self._references[row] = ids, 0
        return row

    def _check_new(self, capsules: tuple[Capsule, ...]) -> None:
        ids = [c.id for c in capsules]
        if len(self._capsules) + len(ids) > self.max_capsules:
            raise BankError(f"the bank is full: it has room for {self.max_capsules} capsules (max_capsules)")
        fingerprint = self.fingerprint
        for capsule in capsules:
            if capsule.id in self._capsules or ids.count(capsule.id) > 1:
                raise BankError(f"capsule {capsule.id!r} is in the bank already; remove it first")
            if capsule.width != self.width:
                raise BankError(f"capsule {capsule.id!r} is for width {capsule.width}, the bank is for {self.width}")
            fingerprint = fingerprint or capsule.model
            if capsule.model != fingerprint:
                raise BankError(
                    f"capsule {capsule.id!r} was made for another model than the bank's; mine it on this model"
                )
            for s in capsule.signatures:
                if s.site not in self._sites:
                    raise BankError(
                        f"capsule {capsule.id!r} has a signature at block {s.site}, "
                        f"the bank's sites are {list(self._sites)}"
                    )
                if s.rank > self.max_rank:
                    raise BankError(
                        f"capsule {capsule.id!r} has a basis of rank {s.rank}, "
                        f"the bank's limit is {self.max_rank} (max_rank)"
                    )
        for block, site in self._sites.items():
            needed = len(site.tenants) + sum(len(c.by_site(block)) for c in capsules)
            if needed > site.capacity:
                raise BankError(
                    f"the bank is full: block {block} has room for {site.capacity} signatures (max_signatures), "
                    f"not for {needed}"
                )

    def _shift(self, capsule: Capsule, number: int, held: int) -> float:
        if self.max_false_fire is None:
            return 0.0
        try:
            return shift_for_rate(capsule.signatures[number].calibration, self.max_false_fire / held)
        except CapsuleError as problem:
            raise BankError(f"capsule {capsule.id!r}, signature {number}, under max_false_fire: {problem}") from None

    def _biases(self, capsules: list[Capsule]) -> dict[tuple[str, int], float]:
        """The bias of each signature in a bank that holds just `capsules`."""
        held = sum(len(c.signatures) for c in capsules)
        return {
            (c.id, n): float(s.bias) - self._shift(c, n, held) for c in capsules for n, s in enumerate(c.signatures)
        }

    def _set_biases(self, biases: Mapping[tuple[str, int], float]) -> None:
        for site in self._sites.values():
            site.set_biases([biases[tenant] for tenant in site.tenants])


def _listed(ids: Iterable[str]) -> tuple[str, ...]:
    if isinstance(ids, str):
        raise RequestError(f"capsule ids must be a list, not the text {ids!r}")
    return tuple(ids)
