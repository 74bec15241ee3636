"""What the operator reads and writes about the running batch: buffers at addresses that never change."""

from collections.abc import Iterable

import torch
from torch import Tensor

from kif_kernels import SiteTensors, candidate_buffers


class Batch:
    """rows [max_tokens] int32: a token's capsule-set row in the bank, -1 for none (padding, dummy runs, empty sets).

    hits [max_tokens, C] bool: which capsules fired on it, in the last forward. owner [max_tokens] int64: which of the
    batch's requests it belongs to, as many as there are for padding. buffers: for candidates, at the site that is
    running, where any of `sites` wants them.
    """

    def __init__(self, max_tokens: int, capsules: int, sites: Iterable[SiteTensors], device: torch.device) -> None:
        self.rows = torch.full((max_tokens,), -1, dtype=torch.int32, device=device)
        self.owner = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self.hits = torch.zeros(max_tokens, capsules, dtype=torch.bool, device=device)
        self.buffers = candidate_buffers(sites, max_tokens)
        self.tokens = 0  # of the running batch; beyond them rows are -1 and hits False
        self._places = torch.arange(max_tokens, dtype=torch.int32, device=device)

    def of(self, count: int) -> tuple[Tensor, Tensor]:
        """Rows [N] and hits [N, C] of the batch's first `count` tokens."""
        return self.rows[:count], self.hits[:count]

    def begin(self, rows: list[int], starts: Tensor, tokens: int) -> None:
        """The next forward, of `tokens` tokens: request i has row rows[i] and those from starts[i] to starts[i + 1].

        starts [R + 1] int32, on the buffers' device: where speculation is adaptive only the device knows them, and
        `tokens` is the most there can be. Nothing waits for the host.
        """
        self.clear()
        self.tokens = tokens
        owner = self.owner[:tokens]
        torch.searchsorted(starts[1:].contiguous(), self._places[:tokens], right=True, out=owner)
        of_request = torch.tensor([*rows, -1], dtype=torch.int32).to(self.rows.device, non_blocking=True)
        torch.index_select(of_request, 0, owner, out=self.rows[:tokens])

    def clear(self) -> None:
        """No token has a set, nothing has fired: what dummy runs need."""
        self.rows[: self.tokens].fill_(-1)
        self.hits[: self.tokens].zero_()
        self.tokens = 0
