"""Where in a model an objective works, and what closed forms need of a LoRA layer."""

from typing import Any

import torch
from torch import Tensor

from ...errors import BakingError


def block_at(depth: float, last_site: int, blocks: int) -> int:
    """The block at this share of all, but not before the capsules' last site: the subject has to be recognised."""
    return min(max(last_site, round(depth * blocks)), blocks - 1)


def weight(layer: Any) -> Tensor:
    """The frozen matrix W [out, in] under a LoRA layer."""
    found = layer.get_base_layer().weight
    return found.T if getattr(layer, "fan_in_fan_out", False) else found


@torch.no_grad()
def write(layer: Any, b: Tensor, a: Tensor) -> None:
    """Make the layer's update ΔW = b a, with b [out, k], a [k, in] and k at most the adapter's rank.

    The layer's scaling is divided out of a. Raises BakingError where k is larger.
    """
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    k = b.shape[1]
    if k > lora_a.shape[0]:
        raise BakingError(f"the closed form has rank {k}, the adapter only {lora_a.shape[0]}; give a rank of {k}")
    lora_a[:k] = (a / layer.scaling["default"]).to(lora_a)
    lora_b.zero_()
    lora_b[:, :k] = b.to(lora_b)
