"""Which block's MLP takes a signature's neuron: its home, the block of its site or one after it.

A neuron that is made a signature's no longer does what it did. One in a block is hardly missed; dozens in one early
block are, whichever they are, and the same number over many blocks is missed less. So the blocks from the site on, up
to REACH of them, take signatures evenly.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..blocks import decoder_blocks, unwrapped

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
REACH = 14
_OTHER = 0.5  # a gate row that changed by this share of its length is another neuron's

Homes = dict[int, tuple[int, ...]]
"""Site → the home of each of its signatures, in their canonical order."""


def homes(signatures: Mapping[int, int], blocks: int, taken: Mapping[int, Tensor] | None = None) -> Homes:
    """signatures: site → how many. blocks: of the model. taken: what `taken` found."""
    load = {block: int(mask.sum()) for block, mask in (taken or {}).items()}
    found: Homes = {}
    for site in sorted(signatures):
        own = []
        for _ in range(signatures[site]):
            home = min(range(site, min(blocks, site + REACH)), key=lambda block: (load.get(block, 0), block))
            load[home] = load.get(home, 0) + 1
            own.append(home)
        found[site] = tuple(own)
    return found


def last_home(homes: Homes) -> int:
    """The last block that a signature may be written into."""
    return max(home for own in homes.values() for home in own)


def taken(model: Any, change: Callable[[str], Tensor | None]) -> dict[int, Tensor]:
    """Block → which neurons [F] of its MLP an earlier adapter has made others. change: path of a module in the plain
    model → what the adapter adds to its weight."""
    paths = {id(module): path for path, module in unwrapped(model).named_modules()}
    found = {}
    for block, module in enumerate(decoder_blocks(model)):
        layer = getattr(getattr(module, "mlp", None), GATE, None)
        added = change(paths[id(layer)]) if layer is not None else None
        if added is not None:
            weight = getattr(layer, "get_base_layer", lambda layer=layer: layer)().weight
            found[block] = added.to(weight.device).norm(dim=1) > _OTHER * weight.norm(dim=1)
    return found
