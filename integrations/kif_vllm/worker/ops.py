"""The operators that stand at sites in compiled graphs. They take a site's name, so that no bank is in the graph."""

from functools import cache
from typing import Any

import torch
from torch import Tensor


def _site(name: Any) -> Any:
    from vllm.forward_context import get_forward_context
    from vllm.utils.torch_utils import _resolve_layer_name

    return get_forward_context().no_compile_layers[_resolve_layer_name(name)]


@cache
def register() -> torch.library.Library:
    """Once per process. The library must outlive the operators, and the cache keeps it."""
    from vllm.utils.torch_utils import LayerNameType, direct_register_custom_op

    def add_norm_(
        hidden: Tensor, residual: Tensor, weight: Tensor, epsilon: float, one_plus: bool, name: LayerNameType
    ) -> None:
        _site(name).add_norm(hidden, residual, weight, epsilon, one_plus)

    def add_norm_fake(
        hidden: Tensor, residual: Tensor, weight: Tensor, epsilon: float, one_plus: bool, name: LayerNameType
    ) -> None:
        return

    def suppress_(x: Tensor, name: LayerNameType) -> None:
        _site(name).suppress(x)

    def suppress_fake(x: Tensor, name: LayerNameType) -> None:
        return

    library = torch.library.Library("kif_vllm", "FRAGMENT")
    direct_register_custom_op("add_norm_", add_norm_, ["hidden", "residual"], add_norm_fake, library)
    direct_register_custom_op("suppress_", suppress_, ["x"], suppress_fake, library)
    return library
