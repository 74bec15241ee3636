"""The bytes that a token moves, counted while the kernel runs on the CPU in Triton's interpreter.

Every load and store is seen with its addresses and mask. Rows of hidden states, which belong to one token, count each
time they are read or written. What belongs to the site or the weights is shared by all tokens: it comes from memory
once a launch, so each of its bytes counts once, divided among the tokens; reading it again is a matter of the cache.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..layout import SiteTensors

TOKENS = 128
MOST_KEPT = 1 << 22  # further addresses, before those seen twice are dropped


@dataclass(frozen=True)
class Traffic:
    """Bytes a token, of the fused operator on `TOKENS` tokens on which nothing fires.

    rows: of hidden and residual, read and written; shared: of everything else, once a launch; cached: what is read
    again, of everything else. least: read hidden and residual, write both.
    """

    width: int
    signatures: int
    rows: float
    shared: float
    cached: float
    least: float

    @property
    def ratio(self) -> float:
        return (self.rows + self.shared) / self.least


def traffic(width: int, signatures: int) -> Traffic:
    """Of `add_norm_suppress_` in bf16 with a set of so many signatures of rank 2. Runs a process of its own, since the
    interpreter has to be chosen before Triton is imported. Raises RuntimeError with its words where that fails.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "0"}
    command = [sys.executable, "-m", __name__, str(width), str(signatures)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"counting bytes failed: {done.stderr.strip().splitlines()[-1:]}")
    return Traffic(**json.loads(done.stdout))


def _count(width: int, signatures: int) -> Traffic:
    from ..add_norm_suppress.triton import add_norm_suppress_

    hidden, residual = torch.randn(2, TOKENS, width, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    site = SiteTensors.empty(
        width=width, signatures=signatures, rank=2, rows=1, set_length=signatures, dtype=torch.bfloat16
    )
    site.bias.fill_(-1.0)  # no score reaches it: the detectors are zero
    site.used.fill_(signatures)
    site.write_set(0, range(signatures))
    accesses = _Accesses((hidden, residual))
    with accesses:
        rows = torch.zeros(TOKENS, dtype=torch.int32)
        weight = torch.ones(width, dtype=torch.bfloat16)
        add_norm_suppress_(hidden, residual, rows, site, weight, 1e-6, False, None, None)
    shared, least = accesses.distinct(), 4 * width * hidden.element_size()
    again = accesses.others - shared
    return Traffic(width, signatures, accesses.rows / TOKENS, shared / TOKENS, again / TOKENS, least)


class _Accesses:
    """Inside its `with` block: bytes moved, those of `tensors` as `rows`, and all `others`. `distinct`: how many of the
    others are not the same byte again; an element of memory is always accessed whole.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
        self._seen: dict[int, list[np.ndarray]] = {}  # size of an element → addresses
        self._kept, self.rows, self.others = 0, 0, 0

    def distinct(self) -> int:
        for parts in self._seen.values():
            parts[:] = [np.unique(np.concatenate(parts))]
        self._kept = 0
        return sum(size * len(parts[0]) for size, parts in self._seen.items())

    def __enter__(self) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self._builder, self._before = InterpreterBuilder, (
            InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store,
        )  # fmt: skip
        load, store = self._before

        def create_masked_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._note(pointers, mask)
            return load(builder, pointers, mask, *rest)

        def create_masked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._note(pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        self._builder.create_masked_load, self._builder.create_masked_store = create_masked_load, create_masked_store

    def __exit__(self, *_: object) -> None:
        self._builder.create_masked_load, self._builder.create_masked_store = self._before

    def _note(self, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape)].astype(np.int64).ravel()
        own = np.zeros(addresses.shape, dtype=bool)
        for start, end in self._spans:
            own |= (addresses >= start) & (addresses < end)
        self.rows += int(own.sum()) * size
        self.others += int((~own).sum()) * size
        self._seen.setdefault(size, []).append(addresses[~own])
        self._kept += len(addresses)
        if self._kept > MOST_KEPT:
            self.distinct()


if __name__ == "__main__":
    print(json.dumps(vars(_count(int(sys.argv[1]), int(sys.argv[2])))))
