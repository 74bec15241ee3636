"""Forward passes of one set of weights in its three roles: student, reference and teacher.

The model is loaded once. The *student* has the adapter on; the *reference* is the same model with it off; the *teacher*
is the reference with the capsules at work. Blocks after the last one that is asked for do not run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kif_kernels import suppress

from ..blocks import decoder_blocks, unwrapped, width
from ..capsule import Capsule, Signature
from ..packing import packed
from .examples import Batch

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Output:
    """hidden: block → its output [B, T, D]. logits [B, T, V], None unless asked for."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


class _Reached(Exception):
    """The last block that was asked for has run."""


class Passes:
    """student(), reference() and teacher() of one PEFT model and the capsules. Padded positions hold no meaning."""

    def __init__(self, model: Any, capsules: Sequence[Capsule]) -> None:
        self.model = model
        self.blocks: nn.ModuleList = decoder_blocks(model)
        self.width = width(model)
        self.device = next(self.blocks.parameters()).device
        self.capsules = tuple(sorted(capsules, key=lambda c: c.id.encode()))
        self._disturbing: dict[int, Edit] = {}
        self._sites = {site: packed(found, self.device) for site, found in _by_site(self.capsules).items()}

    @property
    def sites(self) -> tuple[int, ...]:
        """The capsules' sites, ascending."""
        return tuple(sorted(self._sites))

    def student(
        self, batch: Batch, *, hidden: Sequence[int] = (), logits: bool = False, edits: Mapping[int, Edit] | None = None
    ) -> Output:
        """With the adapter on, recording gradients. edits: block → what its output is replaced by."""
        return self._run(batch, hidden, logits, self._disturbing | dict(edits or {}))

    @torch.no_grad()
    def reference(
        self, batch: Batch, *, hidden: Sequence[int] = (), logits: bool = False, edits: Mapping[int, Edit] | None = None
    ) -> Output:
        """The model as it was: adapter off, no capsule, no gradients."""
        with self.without_adapter():
            return self._run(batch, hidden, logits, dict(edits or {}))

    @torch.no_grad()
    def teacher(self, batch: Batch, *, hidden: Sequence[int] = (), logits: bool = False) -> Output:
        """The model with all capsules at work, by the operator that serves; adapter off, no gradients."""
        with self.without_adapter():
            return self._run(batch, hidden, logits, self.suppression())

    def suppression(self) -> dict[int, Edit]:
        """The capsules' work as edits, site → edit."""
        return {site: self._suppressed(site) for site in self._sites}

    @contextmanager
    def editing(self, edits: Mapping[int, Edit]) -> Iterator[None]:
        """Inside, blocks' outputs are replaced in whatever runs, `generate` among it. edits: block → edit."""
        with self._watching({}, (), dict(edits), None):
            yield

    @contextmanager
    def disturbing(self, edits: Mapping[int, Edit]) -> Iterator[None]:
        """Inside, the student's blocks' outputs are replaced, and nobody else's."""
        self._disturbing = dict(edits)
        try:
            yield
        finally:
            self._disturbing = {}

    def without_adapter(self) -> Any:
        """A context in which the adapter is off."""
        return self.model.disable_adapter() if hasattr(self.model, "peft_config") else nullcontext()

    def _suppressed(self, site: int) -> Edit:
        def edit(x: Tensor) -> Tensor:
            return suppress(x, torch.zeros(x.shape[0], dtype=torch.int32, device=x.device), self._sites[site])

        return edit

    def _run(self, batch: Batch, hidden: Sequence[int], logits: bool, edits: dict[int, Edit]) -> Output:
        wanted = sorted(set(hidden))
        kept: dict[int, Tensor] = {}
        stop = None if logits or not wanted else wanted[-1]
        base = unwrapped(self.model)
        inputs = {"input_ids": batch.ids.to(self.device), "attention_mask": batch.mask.to(self.device)}
        with self._watching(kept, wanted, edits, stop):
            try:
                result = (base if logits else base.base_model)(**inputs, use_cache=False)
            except _Reached:
                return Output(kept)
        return Output(kept, result.logits if logits else None)

    @contextmanager
    def _watching(
        self, kept: dict[int, Tensor], wanted: Sequence[int], edits: dict[int, Edit], stop: int | None
    ) -> Iterator[None]:
        handles = []
        for block in sorted({*wanted, *(b for b in edits if stop is None or b <= stop)}):
            hook = _hook(kept, block, block in wanted, edits.get(block), block == stop)
            handles.append(self.blocks[block].register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hook(kept: dict[int, Tensor], block: int, keep: bool, edit: Edit | None, last: bool) -> Any:
    def hook(_module: nn.Module, _args: object, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        x = edit(x) if edit is not None else x
        if keep:
            kept[block] = x
        if last:
            raise _Reached
        return (x, *output[1:]) if isinstance(output, tuple) else x

    return hook


def _by_site(capsules: Sequence[Capsule]) -> dict[int, list[Signature]]:
    """Site → signatures in canonical order: capsule id bytewise, then number."""
    found: dict[int, list[Signature]] = {}
    for capsule in capsules:
        for signature in capsule.signatures:
            found.setdefault(signature.site, []).append(signature)
    return found
