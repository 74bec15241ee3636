"""Changing a model for the length of a block: whatever happens inside, it is left bit for bit as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks import decoder_blocks

Edit = Callable[[Tensor], Tensor]


@contextmanager
def weights_kept(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[list[nn.Parameter]]:
    """The floating-point parameters, which may be changed and ask for gradients inside the block; there all of them are
    of `dtype`, if one is given.

    Afterwards every parameter has its bits, its dtype, its flag and its gradient back. Gradients are on inside the
    block. Costs a copy of the weights.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    before = [(p.data, p.requires_grad, p.grad) for p in parameters]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for parameter in parameters:
                parameter.grad = None
                parameter.data = parameter.data.to(dtype or parameter.dtype, copy=True)
                parameter.requires_grad_(True)
            yield parameters
    finally:
        with torch.no_grad():
            for parameter, (value, asks, gradient) in zip(parameters, before, strict=True):
                parameter.grad = None
                parameter.data = value
                parameter.requires_grad_(asks)
                parameter.grad = gradient


@contextmanager
def edited(model: nn.Module, edits: dict[int, Edit]) -> Iterator[None]:
    """The output of decoder block l becomes edits[l](output), [B, T, D], in every forward inside the block.

    Runs after whatever is attached to the block.
    """
    blocks = decoder_blocks(model)
    handles = []

    def hook(edit: Edit) -> Callable[..., Any]:
        def change(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(output[0]), *output[1:])
            return edit(output)

        return change

    try:
        for site, edit in edits.items():
            handles.append(blocks[site].register_forward_hook(hook(edit)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def site_states(model: Any, ids: Tensor, mask: Tensor, sites: list[int]) -> dict[int, Tensor]:
    """The outputs of blocks `sites`, each [B, T, D], for ids and mask [B, T]."""
    found: dict[int, Tensor] = {}

    def note(site: int) -> Edit:
        def keep(hidden: Tensor) -> Tensor:
            found[site] = hidden.detach().clone()
            return hidden

        return keep

    device = next(model.parameters()).device
    with edited(model, {site: note(site) for site in sites}):
        model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    return found
