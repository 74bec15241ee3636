"""Fine-tuning a model on questions and answers, so that it can be killed and goes on; kept under the cache folder."""

import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import torch
from safetensors.torch import load_file, safe_open, save_file

from kif_runtime import KifError
from kif_runtime.evaluation.answers import answer, question
from kif_runtime.evaluation.facts import padded
from kif_runtime.evaluation.tofu_sets import Item

SAVE_EVERY = 120.0  # seconds between checkpoints


@dataclass(frozen=True)
class Recipe:
    """AdamW without weight decay, linear warm-up over a tenth of the steps, then linear decay to zero. Not tuned: the
    published recipes are for larger models."""

    epochs: int = 5
    batch: int = 8
    rate: float = 1e-4
    seed: int = 0


def trained(model: Any, tokenizer: Any, items: Sequence[Item], recipe: Recipe, folder: Path, title: str) -> None:
    """Train `model` in place on the answers of `items`, and save its weights to `folder`; or load them from there.

    A run that was killed goes on from its last checkpoint, at most SAVE_EVERY seconds back, and ends with the same
    weights. Raises KifError for no items, or a folder that was made by another recipe.
    """
    if not items:
        raise KifError("there is nothing to train on; choose more authors")
    settings = asdict(recipe) | {"items": len(items)}
    weights, checkpoint, told = (
        folder / "weights.safetensors",
        folder / "checkpoint.safetensors",
        folder / "recipe.json",
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if told.is_file() and json.loads(told.read_text()) != settings:
        raise KifError(f"{folder} was made by another recipe; remove it, or set KIF_CACHE to another folder")
    told.write_text(json.dumps(settings))
    if weights.is_file():
        put(model, load_file(weights))
        common.say(f"{title}: trained before, loaded")
        return
    _train(model, tokenizer, items, recipe, checkpoint, title)
    write(weights, named(model))
    checkpoint.unlink(missing_ok=True)


def _train(model: Any, tokenizer: Any, items: Sequence[Item], recipe: Recipe, checkpoint: Path, title: str) -> None:
    pairs = [(question(tokenizer, i.question), answer(tokenizer, i.answer)) for i in items]
    parameters = [p.requires_grad_(True) for p in model.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.rate, weight_decay=0.0, fused=True)
    order = batches(len(items), recipe)
    begun = _resume(model, optimiser, checkpoint)
    if begun:
        common.say(f"{title}: goes on after step {begun} of {len(order)}")
    saved = started = time.monotonic()
    with torch.enable_grad():
        for step in range(begun, len(order)):
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate * share_of_rate(step, len(order))
            loss = answer_loss(model, [pairs[i] for i in order[step]])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            if time.monotonic() - saved > SAVE_EVERY or step + 1 == len(order):
                saved = time.monotonic()
                _save(model, optimiser, checkpoint, step + 1)
                left = (saved - started) / (step + 1 - begun) * (len(order) - step - 1)
                common.say(
                    f"{title}: step {step + 1} of {len(order)}, loss {float(loss.detach()):.3f}, {left:.0f} s to go"
                )
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


def batches(count: int, recipe: Recipe) -> list[list[int]]:
    """The items of every step: each epoch in an order of its own."""
    found = []
    for epoch in range(recipe.epochs):
        order = list(range(count))
        random.Random(f"{recipe.seed} {epoch}").shuffle(order)
        found += [order[i : i + recipe.batch] for i in range(0, count, recipe.batch)]
    return found


def share_of_rate(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def answer_loss(model: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean −log p of the answers' tokens and end tokens."""
    ids, mask = padded([[*q, *a] for q, a in pairs])
    labels = ids.masked_fill(mask == 0, -100)
    for row, (q, _) in zip(labels, pairs, strict=True):
        row[: len(q)] = -100
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def named(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().contiguous() for name, p in model.named_parameters()}


def put(model: Any, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata)
    os.replace(temporary, path)


def _save(model: Any, optimiser: Any, path: Path, step: int) -> None:
    tensors = {f"weight:{name}": value for name, value in named(model).items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"{key}:{number}": value.clone() for key, value in state.items()}
    write(path, tensors, {"step": str(step)})


def _resume(model: Any, optimiser: Any, path: Path) -> int:
    """The number of steps done; the model and the optimiser are as they were after them."""
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    put(model, {name.removeprefix("weight:"): t for name, t in tensors.items() if name.startswith("weight:")})
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        key, _, number = name.partition(":")
        if key != "weight":
            state.setdefault(int(number), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return step
