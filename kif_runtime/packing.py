"""How capsules' signatures are put into one site's tensors and taken out again, without moving a tensor."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf

import torch

from kif_kernels import SiteTensors

from .capsule import Signature


@dataclass
class PackedSite:
    """A site's tensors, with who lives in each used slot: (capsule id, signature number)."""

    tensors: SiteTensors
    tenants: list[tuple[str, int]] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        return self.tensors.bias.shape[0]

    def slots(self, ids: Iterable[str]) -> list[int]:
        """The slots of these capsules in canonical order: capsule id bytewise, then signature number."""
        wanted = set(ids)
        live = [(id.encode(), number, slot) for slot, (id, number) in enumerate(self.tenants) if id in wanted]
        return [slot for _, _, slot in sorted(live)]

    def put(self, tenant: tuple[str, int], owner: int, signature: Signature) -> None:
        t, slot, rank = self.tensors, len(self.tenants), signature.rank
        t.detector[slot] = signature.detector
        t.k[slot] = inf if signature.k is None else signature.k
        t.tau[slot] = 0.0 if signature.tau is None else signature.tau
        t.basis[slot].zero_()[:rank] = signature.basis
        t.target[slot].zero_()[:rank] = signature.target
        t.strength[slot] = signature.strength
        t.owner[slot] = owner
        self.tenants.append(tenant)
        t.used.fill_(len(self.tenants))

    def drop(self, id: str) -> None:
        """Free the slots of a capsule; the last live slots move into the gaps, so that live slots stay a prefix."""
        t = self.tensors
        for slot in reversed([s for s, tenant in enumerate(self.tenants) if tenant[0] == id]):
            last = len(self.tenants) - 1
            for tensor in t.by_slot:
                tensor[slot] = tensor[last]
            t.bias[last] = -inf
            self.tenants[slot] = self.tenants[last]
            self.tenants.pop()
        t.used.fill_(len(self.tenants))

    def set_biases(self, biases: Sequence[float]) -> None:
        t, n = self.tensors, len(biases)
        wanted = torch.tensor(biases, dtype=torch.float32, device=t.bias.device)
        changed = (t.bias[:n] != wanted).nonzero().squeeze(-1)  # a slot that was free has -inf
        t.bias[changed] = wanted[changed]
        for some in changed.split(1024):  # float64 temporaries stay small
            t.write_screen(some)

    def write_set(self, row: int, ids: Iterable[str]) -> None:
        self.tensors.write_set(row, self.slots(ids))
