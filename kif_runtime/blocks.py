"""Finding a model's decoder blocks by structure, since every family names them differently."""

from typing import Any

from torch import nn

from .errors import ModelError


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks, block `l` at index l; its outputs are the sites.

    Looks through PEFT and torch.compile wrappers. Raises ModelError for encoder-decoder models, encoders, and models
    where no list, or more than one, could be it: better refused than served unsuppressed.
    """
    base = unwrapped(model)
    config = text_config(base)
    if getattr(base.config, "is_encoder_decoder", False):
        raise ModelError(f"{_kind(base)} is an encoder-decoder model; KIF works on decoder-only models")
    found = _candidates(base, config.num_hidden_layers)
    causal = {path: blocks for path, blocks in found.items() if not _is_encoder(path, blocks)}
    if len(causal) == 1:
        return next(iter(causal.values()))
    if causal:
        raise ModelError(
            f"several lists in {_kind(base)} could be its blocks ({', '.join(causal)}); use a model with one"
        )
    if found:
        raise ModelError(f"{_kind(base)} is an encoder, its blocks see later tokens; KIF works on decoder-only models")
    raise ModelError(
        f"{_kind(base)} has no list of {config.num_hidden_layers} decoder blocks; KIF needs them in one list"
    )


def width(model: nn.Module) -> int:
    """D, the width of the residual stream. Raises ModelError where the model's configuration does not state it."""
    size = getattr(text_config(unwrapped(model)), "hidden_size", None)
    if not isinstance(size, int):
        raise ModelError(f"{_kind(model)} states no hidden_size; KIF needs a Hugging Face decoder model")
    return size


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside torch.compile and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
        else:
            return model


def text_config(model: nn.Module) -> Any:
    """The configuration of the language part. Raises ModelError where there is none or it counts no layers."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ModelError(f"{_kind(model)} has no config that counts its layers; KIF needs a Hugging Face decoder model")
    return config


def _candidates(model: nn.Module, count: int) -> dict[str, nn.ModuleList]:
    """Outermost ModuleLists of `count` compound modules, by path."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != count:
            continue
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if not inside and all(_is_compound(m) for m in module):
            found[path] = module
    return found


def _is_compound(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(p.ndim >= 2 for p in module.parameters())


def _is_encoder(path: str, blocks: nn.ModuleList) -> bool:
    not_causal = any(getattr(m, "is_causal", None) is False for m in blocks[0].modules())
    return not_causal or "encoder" in path.split(".")


def _kind(model: nn.Module) -> str:
    return type(unwrapped(model)).__name__
