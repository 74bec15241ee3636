"""Sequential erasure: a later adapter on top of an earlier one, and both as one.

The earlier adapter is merged into the weights that the later one is trained on, so that the reference has forgotten the
earlier subjects too and nothing pulls them back. What is written is the sum of both: their factors side by side.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..errors import BakingError
from ..files import shown
from .adapter import keeps_inputs_first

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROVENANCE = "kif.json"
_PREFIX = "base_model.model."
Factors = dict[str, tuple[Tensor, Tensor]]
"""Module path → A [r, inputs] with the scale in it, B [outputs, r]."""


class Earlier:
    """An adapter that was written before: factors by module path, A [r, inputs] with the scale in it, B [outputs, r];
    rows, token → its embedding [D], which objectives that change some leave beside them; digest, of its weights' file.

    Raises BakingError for a folder that holds none, or one that is no plain LoRA.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            config = json.loads((Path(folder) / CONFIG).read_text())
            data = (Path(folder) / WEIGHTS).read_bytes()
            tensors = load(data)
            scale = float(config["lora_alpha"]) / int(config["r"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            raise BakingError(f"{shown(folder)} holds no LoRA adapter; give the folder that a baking wrote") from None
        odd = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save")
        if config.get("peft_type") != "LORA" or any(config.get(option) for option in odd):
            raise BakingError(f"the adapter in {shown(folder)} is no plain LoRA; give one that a baking wrote")
        self.digest = hashlib.sha256(data).hexdigest()
        self.capsules: list[str] = _digests(Path(folder))
        self.rows = _rows(config, tensors)
        self.factors: Factors = {}
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                b = tensors.get(name.replace(".lora_A.", ".lora_B."))
                if b is None:
                    raise BakingError(f"the adapter in {shown(folder)} lacks a factor; bake it again")
                module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
                self.factors[module] = (a.float() * scale, b.float())

    def change(self, module: str) -> Tensor | None:
        """What it adds to the weight [outputs, inputs] of `module`; None where it adds nothing."""
        found = self.factors.get(module)
        return None if found is None else found[1] @ found[0]

    @contextmanager
    def at_work(self, model: Any) -> Iterator[None]:
        """Inside, the plain `model` is what the adapter makes of it."""
        with added(model, self.factors), embedded(model, self.rows):
            yield


def _rows(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[int, Tensor]:
    tokens = config.get("trainable_token_indices") or []
    found = [rows for name, rows in tensors.items() if name.endswith(".trainable_tokens_delta")]
    return dict(zip(tokens, found[0], strict=True)) if found else {}


@contextmanager
def added(model: Any, factors: Factors) -> Iterator[None]:
    """Inside, the plain `model` has the adapter in its weights; afterwards they are as they were, bit for bit. Raises
    BakingError where it does not fit."""
    modules = dict(model.named_modules())
    kept: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for path, (a, b) in factors.items():
                weight = getattr(modules.get(path), "weight", None)
                change = (b @ a).T if keeps_inputs_first(modules.get(path)) else b @ a
                if weight is None or weight.shape != change.shape:
                    raise BakingError(f"the earlier adapter does not fit this model (at {path}); use its own model")
                kept[path] = weight.detach().clone()
                weight += change.to(weight.device, weight.dtype)
        yield
    finally:
        with torch.no_grad():
            for path, values in kept.items():
                modules[path].weight.copy_(values)


@contextmanager
def embedded(model: Any, rows: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, the tokens in `rows` have these embeddings [D]; afterwards their own."""
    weight = model.get_input_embeddings().weight.detach()
    kept = {token: weight[token].clone() for token in rows}
    try:
        for token, row in rows.items():
            weight[token] = row.to(weight)
        yield
    finally:
        for token, row in kept.items():
            weight[token] = row


def joined(first: Factors, second: Factors) -> Factors:
    """The factors of the sum of two adapters, all of one rank: the sum of their ranks, zeros where one has no part."""
    ranks = [next(iter(factors.values()))[0].shape[0] for factors in (first, second)]
    result = {}
    for module in dict.fromkeys([*first, *second]):
        a, b = (first.get(module) or second[module])[:2]
        parts = [
            factors.get(module, (a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)))
            for factors, rank in zip((first, second), ranks, strict=True)
        ]
        result[module] = (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], 1))
    return result


def compact(factors: Factors) -> Factors:
    """The same changes in as few ranks as the module that needs most: one in which either factor is 0 adds nothing."""
    used = {module: (a.abs().amax(1) > 0) & (b.abs().amax(0) > 0) for module, (a, b) in factors.items()}
    rank = max(1, *(int(ranks.sum()) for ranks in used.values()))
    result = {}
    for module, (a, b) in factors.items():
        a, b = a[used[module]], b[:, used[module]]
        empty = rank - len(a)
        result[module] = (
            torch.cat([a, a.new_zeros(empty, a.shape[1])]), torch.cat([b, b.new_zeros(b.shape[0], empty)], 1),
        )  # fmt: skip
    return result


def _digests(folder: Path) -> list[str]:
    """Digests of all capsules that the adapter in `folder` is from; none where it was not made by KIF."""
    try:
        told = json.loads((folder / PROVENANCE).read_text())
        return [str(digest) for digest in (*told["earlier"], *told["capsules"])]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        raise BakingError(f"{shown(folder / PROVENANCE)} cannot be read; bake the adapter again") from None
