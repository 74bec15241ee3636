"""Where capsules fire, token by token, without attaching them: plain hooks that put the bare states to the operator.

A capsule leaves every prompt on which it does not fire exactly as it was. So one forward of the bare model tells, for
any number of capsules at once, which prompts each of them can change at all; only those need a forward of their own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kif_kernels import suppress_

from ..bank import CapsuleBank
from ..blocks import decoder_blocks
from ..capsule import Capsule
from .facts import keeping


class Firing:
    """Hits of the last forward inside `watching`: hits [B·T, C] bool, a column per capsule in the order of `ids`."""

    def __init__(self, bank: CapsuleBank, ids: Sequence[str], *, apply: bool) -> None:
        self.bank, self.ids, self.apply = bank, tuple(ids), apply
        self._columns = torch.tensor([bank.index(id) for id in ids], dtype=torch.long)
        self._row = bank.row(ids)
        self._hits: Tensor | None = None

    @property
    def hits(self) -> Tensor:
        if self._hits is None:
            return torch.zeros(0, len(self.ids), dtype=torch.bool)
        return self._hits.cpu()[:, self._columns]

    def at(self, site: int, hidden: Tensor) -> Tensor:
        """What becomes of the states [B, T, D] of a site; hits are noted either way."""
        batch, length, _ = hidden.shape
        if self._hits is None or site == self.bank.sites[0]:  # a new forward
            self._hits = torch.zeros(batch * length, self.bank.max_capsules, dtype=torch.bool, device=hidden.device)
        rows = torch.full((batch,), self._row, dtype=torch.int32, device=hidden.device)
        edited = hidden.detach().clone()
        suppress_(edited, rows, self.bank.site(site), self._hits)
        return edited if self.apply else hidden


@contextmanager
def watching(model: Any, capsules: Sequence[Capsule], *, apply: bool = False) -> Iterator[Firing]:
    """Note for every forward inside the block which of `capsules` fire on which token.

    apply=False: the model stays bare, and each capsule's hits are those at its bare states, which is where a capsule
    that is alone fires first. apply=True: all are applied together.
    """
    device = next(model.parameters()).device
    bank = CapsuleBank.for_capsules(capsules, device=device, max_sets=1)
    firing = Firing(bank, [c.id for c in capsules], apply=apply)
    with hooked(model, firing):
        yield firing


@contextmanager
def hooked(model: Any, firing: Firing) -> Iterator[None]:
    """The hooks of `watching`, for a Firing whose bank the caller made."""
    blocks = decoder_blocks(model)

    def hook(site: int) -> Any:
        def run(module: Any, args: Any, output: Any) -> Any:
            if not isinstance(output, tuple):
                return firing.at(site, output)
            return (firing.at(site, output[0]), *output[1:])

        return run

    handles = [blocks[site].register_forward_hook(hook(site)) for site in firing.bank.sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def fires_on(model: Any, firing: Firing, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, T, C] bool: hits of one forward of ids [B, T] inside `hooked` or `watching`, False where mask [B, T] is 0."""
    device = next(model.parameters()).device
    mask = torch.ones_like(ids) if mask is None else mask
    model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **keeping(model, 1))
    return firing.hits.view(*ids.shape, -1) & mask.bool()[..., None]
