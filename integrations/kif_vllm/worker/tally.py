"""What fired, counted: per request for evidence, in sum for metrics. Stays on the device until somebody asks."""

import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Tally:
    """Counts for the last `requests` requests seen and C capsule columns, and totals since the start.

    seen, suppressed: tokens computed, and those on which any capsule fired. touched: requests with such a token.
    """

    def __init__(self, requests: int, capsules: int, device: torch.device) -> None:
        self.fired = torch.zeros(requests, capsules, dtype=torch.int32, device=device)
        self.total = torch.zeros(capsules, dtype=torch.int64, device=device)
        self.suppressed = torch.zeros((), dtype=torch.int64, device=device)
        self.touched = torch.zeros((), dtype=torch.int64, device=device)
        self.seen = 0
        self.seconds = 0.0
        self._slots: OrderedDict[str, int] = OrderedDict()

    def add(self, hits: Tensor, owner: Tensor, requests: list[str]) -> None:
        """One forward of N tokens: hits [N, C], and owner [N], the place of each token's request in `requests`."""
        self.seen += len(owner)
        slots = torch.tensor([self._slot(request) for request in requests]).to(hits.device, non_blocking=True)
        if hits.device.type == "cpu" and not bool(hits.any()):
            return
        fired = torch.zeros(len(requests) + 1, hits.shape[1], dtype=torch.int32, device=hits.device)
        fired.index_add_(0, owner, hits.to(torch.int32))  # the last row is that of tokens of no request
        before = self.fired[slots]
        self.fired[slots] = before + fired[:-1]
        self.touched += (fired[:-1].any(1) & ~before.any(1)).sum()
        self.suppressed += hits.any(1).sum()
        self.total += fired.sum(0)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around a forward: the wall time of all forwards, to which the gate's is compared on the CPU."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def of(self, request: str) -> Tensor | None:
        """[C] tokens on which each capsule fired in this request; None where it was not seen, or too long ago."""
        slot = self._slots.get(request)
        return None if slot is None else self.fired[slot]

    def forget_column(self, column: int) -> int:
        """A capsule leaves: its column will be another's. Gives its total."""
        total = int(self.total[column])
        self.fired[:, column] = 0
        self.total[column] = 0
        return total

    def figures(self) -> dict[str, Any]:
        return {
            "tokens_seen": self.seen,
            "tokens_suppressed": int(self.suppressed),
            "requests_touched": int(self.touched),
            "forward_seconds": self.seconds,
        }

    def _slot(self, request: str) -> int:
        if request in self._slots:
            self._slots.move_to_end(request)
            return self._slots[request]
        if len(self._slots) < len(self.fired):
            slot = len(self._slots)
        else:
            slot = self._slots.popitem(last=False)[1]
            self.fired[slot] = 0
        self._slots[request] = slot
        return slot
