"""Which capsules apply to which input row: the bank's rows for a list of capsule sets, held while they are in use."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kif_runtime.bank import CapsuleBank
from kif_runtime.capsule import Capsule
from kif_runtime.errors import RequestError

from .caches import Key


@dataclass(frozen=True, eq=False)
class Choice:
    """n capsule sets, one per input row. `held` are their rows in the bank, `sites` where any has a signature."""

    rows: Tensor  # [n] int32
    held: tuple[int, ...]
    keys: Key  # what the states computed under each set depend on
    sites: frozenset[int]

    @property
    def count(self) -> int:
        return len(self.keys)

    def rows_of(self, batch: int) -> Tensor:
        """[B] int32, every set repeated B / n times. Raises RequestError where that does not come out even."""
        if batch == self.count:
            return self.rows
        if batch % self.count:
            raise RequestError(
                f"using() got {self.count} lists and the batch has {batch} rows; give one list per input row"
            )
        return self.rows.repeat_interleave(batch // self.count)

    def key_of(self, batch: int) -> Key:
        """What identifies the sets of a batch of B rows; the same whether one list stands for all or is repeated."""
        first = self.keys[0]
        if all(key == first for key in self.keys):
            return (first,)
        return tuple(key for key in self.keys for _ in range(batch // self.count))


class Chooser:
    """Turns lists of capsule ids into a `Choice`, the mandatory ones always among them."""

    def __init__(
        self, bank: CapsuleBank, capsules: dict[str, Capsule], mandatory: tuple[str, ...], device: torch.device
    ) -> None:
        self.bank, self.capsules, self.mandatory, self.device = bank, capsules, mandatory, device

    def check(self, lists: Sequence[Sequence[str]]) -> None:
        """Raise RequestError unless every list holds ids of attached capsules."""
        if not lists:
            raise RequestError("using() needs a list of capsule ids per input row, as in using(['france'], [])")
        for ids in lists:
            if isinstance(ids, str) or not all(isinstance(id, str) for id in ids):
                raise RequestError(f"using() takes lists of capsule ids, one list per input row; got {ids!r}")
            if unknown := [id for id in ids if id not in self.capsules]:
                raise RequestError(
                    f"no capsule {unknown[0]!r} is attached; attached are {', '.join(self.capsules) or 'none'}"
                )

    def choose(self, lists: Sequence[Sequence[str]]) -> Choice:
        """Take the bank's rows for these sets, until `release`. Raises BankError where it has no more."""
        chosen = [sorted({*ids, *self.mandatory}) for ids in lists]
        held: list[int] = []
        try:
            for ids in chosen:
                held.append(self.bank.row(ids))
        except BaseException:
            self._give_back(held)
            raise
        with torch.inference_mode(False):  # it outlives the block that it was made in
            rows = torch.tensor(held, dtype=torch.int32, device=self.device)
        sites = frozenset(site for ids in chosen for id in ids for site in self.capsules[id].sites)
        return Choice(rows, tuple(held), tuple(self._key(ids) for ids in chosen), sites)

    def release(self, choice: Choice) -> None:
        self._give_back(choice.held)

    def _give_back(self, held: Sequence[int]) -> None:
        for row in held:
            self.bank.release(row)

    def _key(self, ids: Sequence[str]) -> int:
        """63 bits that stand for a set's content in every process; an integer, which graphs need not specialise on."""
        content: list[object] = [[id, self.capsules[id].digest] for id in ids]
        if self.bank.max_false_fire is not None:  # thresholds then depend on how many signatures share it
            content += [self.bank.max_false_fire, sum(len(c.signatures) for c in self.bank.capsules.values())]
        return int.from_bytes(hashlib.sha256(json.dumps(content).encode()).digest()[:8], "big") >> 1
