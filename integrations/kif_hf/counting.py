"""Which tokens fired: counted per capsule and input row, padding left out."""

from typing import Any

import torch
from torch import Tensor


class Tally:
    """Tokens on which each of C capsules fired, since the last `reset`. Stays on the device until it is read."""

    def __init__(self, capsules: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # it is changed in place inside and outside inference mode
            self.total = torch.zeros(capsules, dtype=torch.int64, device=device)
            self.rows = torch.zeros(0, capsules, dtype=torch.int64, device=device)

    def add(self, hits: Tensor, real: Tensor | None, rows: int) -> None:
        """Count one forward. hits [B·T, C] bool; real [B, T] bool, False for padding, or None. `rows` divides B.

        Another number of rows than before begins the count per row anew.
        """
        if self.rows.shape[0] != rows:
            self._begin(rows)
        if hits.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(hits.any()):
            return
        if real is not None:
            hits = hits & real.reshape(-1, 1)
        found = hits.view(rows, -1, hits.shape[1]).sum(1)
        self.rows += found
        self.total += found.sum(0)

    def reset(self) -> None:
        self.total.zero_()
        self.rows.zero_()

    def _begin(self, rows: int) -> None:
        if torch.compiler.is_compiling():
            self.rows = torch.zeros(rows, self.total.shape[0], dtype=torch.int64, device=self.total.device)
            return
        with torch.inference_mode(False):
            self.rows = torch.zeros(rows, self.total.shape[0], dtype=torch.int64, device=self.total.device)


def real_tokens(mask: Any, batch: int, length: int, past: int | Tensor) -> Tensor | None:
    """[B, T] bool, False for padding, from whatever attention mask a decoder got; None where nothing says that any is.

    mask: [B, past + T] with 0 for padding; or [B or 1, 1, T, keys] bool or additive, as generate makes for static
    caches, where a token is real if it may see itself; or a dict of those by layer type. `past` tokens came before.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask[:, -length:] != 0
    sees = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    # Without a limit the keys are those before and these; a static cache has more behind, a sliding one fewer before.
    before = mask.shape[-1] - length
    start = past.to(mask.device).clamp(max=before) if isinstance(past, Tensor) else min(past, before)
    own = (torch.arange(length, device=mask.device) + start).view(1, length, 1).expand(sees.shape[0], -1, -1)
    return sees.gather(-1, own).squeeze(-1).expand(batch, -1)


def finished(tokens: Tensor, stop: Tensor) -> Tensor:
    """[B, T] bool, True for what generate feeds to rows that have ended; stop [E]: the end and padding ids."""
    return (tokens.unsqueeze(-1) == stop).any(-1)
