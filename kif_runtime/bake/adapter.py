"""The LoRA that is trained: where it goes, its parameters, and what may be wrong with it."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import decoder_blocks, unwrapped
from ..errors import BakingError
from .settings import ALL, ATTENTION, MLP, Settings

_ATTENTION = re.compile(r"(^|\.)\w*att(n|ention)\w*\.")


@contextmanager
def adapted(model: Any, settings: Settings, seed: int) -> Iterator[Any]:
    """`model` in a PEFT wrapper with a fresh LoRA that changes nothing yet, in eval mode; only the LoRA is trained.

    Afterwards the model is without it, as it was.

    Raises BakingError where the rank is over a projection's width, or nothing is called what `settings.targets` says.
    """
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "peft_config"):
        raise BakingError(
            "the model has an adapter on already; bake on the plain model, with continue_from for its own"
        )
    names, pattern = _targets(model, settings)
    count = len(decoder_blocks(model))
    blocks = min(settings.blocks or count, count)
    options = {} if blocks == count else {"layers_to_transform": list(range(blocks)), "layers_pattern": pattern}
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=names, task_type="CAUSAL_LM", **options
    )
    training, trained = model.training, {n: p.requires_grad for n, p in model.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    try:
        yield wrapped.eval()
    finally:
        wrapped.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        model.train(training)


def parameters(model: Any) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def layers(model: Any) -> dict[str, Any]:
    """The LoRA layers by module path."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "get_base_layer")}


def copied(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters' values, on the CPU, apart from them."""
    return {name: p.detach().cpu().clone() for name, p in adapter.items()}


@torch.no_grad()
def put_back(adapter: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Give the parameters the `values` that `copied` took."""
    for name, parameter in adapter.items():
        parameter.copy_(values[name])


def _targets(model: Any, settings: Settings) -> tuple[list[str], str]:
    """Names of the projections that get a LoRA, and the name of the list of blocks."""
    blocks = decoder_blocks(model)
    path = next(path for path, module in unwrapped(model).named_modules() if module is blocks)
    inside = {name: m for name, m in blocks[0].named_modules() if _widths(m) is not None}
    chosen = {name: m for name, m in inside.items() if _wanted(name, settings.targets)}
    if not chosen:
        there = ", ".join(sorted({name.split(".")[-1] for name in inside}))
        raise BakingError(f"no projection of this model is called {', '.join(settings.targets)}; it has {there}")
    for name, module in chosen.items():
        widths = _widths(module)
        if widths is not None and not 1 <= settings.rank <= min(widths):
            raise BakingError(
                f"rank {settings.rank} does not fit {name.split('.')[-1]}, which is {widths[0]} by {widths[1]}; "
                f"ask for 1 to {min(widths)}"
            )
    return sorted({name.split(".")[-1] for name in chosen}), path.split(".")[-1]


def _wanted(name: str, targets: tuple[str, ...]) -> bool:
    kind = ATTENTION if _ATTENTION.search(name) else MLP
    return bool({ALL, kind, name.split(".")[-1]} & set(targets))


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a projection that PEFT can put a LoRA on; GPT-2's are called Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if keeps_inputs_first(module):
        return module.weight.shape[0], module.weight.shape[1]  # type: ignore[index,return-value]
    return None


def keeps_inputs_first(module: nn.Module | None) -> bool:
    """Whether its weight is [inputs, outputs], as GPT-2's are: a shape alone does not tell, where it is square."""
    return type(module).__name__ == "Conv1D"
