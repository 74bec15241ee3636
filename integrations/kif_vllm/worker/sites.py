"""Where site l is in vLLM's models, by an explicit registry that the structure found must agree with.

In most decoders of vLLM the sum that is the output of block l is formed in the norm that follows: block l + 1's
`input_layernorm(hidden, residual)`, or the final norm. There the site is the norm. Other blocks return the sum itself.
An architecture that is not listed is refused: unsuppressed serving would not be noticed.
"""

from typing import Any, NamedTuple

from torch import nn

from kif_runtime.errors import ModelError


class Place(NamedTuple):
    """Paths in the model. `norm`: the block's first norm, or None where the block's output is the sum."""

    blocks: str
    norm: str | None = None
    final: str | None = None


_NORM = Place("model.layers", "input_layernorm", "model.norm")

# Each was compared with the Hugging Face model of the same weights: tests/vllm/test_engine_architectures.py.
REGISTRY = {
    "LlamaForCausalLM": _NORM,
    "MistralForCausalLM": _NORM,
    "Qwen2ForCausalLM": _NORM,
    "Qwen3ForCausalLM": _NORM,
    "Phi3ForCausalLM": _NORM,
    "Gemma2ForCausalLM": _NORM,
    "Gemma3ForCausalLM": _NORM,
    "GPT2LMHeadModel": Place("transformer.h"),
    "OPTForCausalLM": Place("model.decoder.layers"),
}
_NORM_CLASSES = ("RMSNorm", "GemmaRMSNorm")


def place_of(model: nn.Module) -> Place:
    """Raises ModelError for an architecture that is not in the registry."""
    name = type(model).__name__
    if name not in REGISTRY:
        raise ModelError(
            f"KIF does not know {name} in vLLM, so nothing is served; known: {', '.join(sorted(REGISTRY))}"
        )
    return REGISTRY[name]


def module_of(model: nn.Module, place: Place, site: int, blocks: int) -> nn.Module | None:
    """The module at which site `site` of a model with `blocks` blocks lies; None where another pipeline stage has it.

    Raises ModelError where the structure is not what the registry says.
    """
    layers = _at(model, place.blocks)
    if not isinstance(layers, nn.ModuleList) or len(layers) != blocks:
        raise ModelError(f"{type(model).__name__}.{place.blocks} is no list of {blocks} blocks; KIF cannot place sites")
    if not 0 <= site < blocks:
        raise ModelError(f"there is no block {site} in a model of {blocks}; capsules must be mined on this model")
    if place.norm is None:
        found = layers[site]
    elif site + 1 < blocks:
        found = layers[site + 1] if _missing(layers[site + 1]) else _at(layers[site + 1], place.norm)
    else:
        found = _at(model, place.final or "")
    if _missing(found):
        return None
    if place.norm is not None:
        _check_norm(found, site)
    return found


def _check_norm(norm: Any, site: int) -> None:
    name = type(norm).__name__
    if name not in _NORM_CLASSES:
        raise ModelError(f"the norm after block {site} is a {name}, KIF knows {' and '.join(_NORM_CLASSES)}")
    if getattr(norm, "variance_size_override", None) is not None or not getattr(norm, "has_weight", True):
        raise ModelError(f"the norm after block {site} has no weight or a part of the width; KIF cannot replace it")


def _at(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part, None)
    return module


def _missing(module: Any) -> bool:
    return type(module).__name__ == "PPMissingLayer"
