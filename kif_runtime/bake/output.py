"""What a baking leaves: a PEFT adapter that needs nothing of KIF, its provenance, and a card; no name in any of it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import BakingError, one_line
from ..files import atomic_write, reason, shown
from .checkpoints import NAME as CHECKPOINT
from .continuing import CONFIG, PROVENANCE, WEIGHTS, Factors, added, embedded
from .curves import drawing
from .trainer import LOG

CARD, MERGED, CURVES = "README.md", "merged", "curves.svg"
_ALONE = "Signatures could not be written as neurons of this model, so all of it was trained.\n\n"


def check_folder(folder: Path) -> None:
    """Make the folder. Raises BakingError where it cannot be, or holds anything but an unfinished baking."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".kif-"))
    except (OSError, ValueError) as failure:
        raise BakingError(f"cannot use the folder {shown(folder)}: {reason(failure)}") from None
    unfinished = LOG in there and PROVENANCE not in there  # kif.json is written last
    ours = (CHECKPOINT, LOG, WEIGHTS, CONFIG, CARD, MERGED, CURVES) if unfinished else ()
    if other := [name for name in there if name not in ours]:
        raise BakingError(f"{shown(folder)} is not empty ({one_line(other[0], 60)} is there); choose another folder")


def write_adapter(
    folder: Path, factors: Factors, targets: list[str], task: str = "CAUSAL_LM", base: str = "",
    rows: Mapping[int, Tensor] | None = None, embeddings: str = "",
) -> int:  # fmt: skip
    """adapter_model.safetensors and adapter_config.json, as PEFT and vLLM read them. factors: by module path, A [r,
    inputs] with the scale in it, B [outputs, r]. rows: token → its embedding [D] in the module called `embeddings`, for
    PEFT alone. Returns the bytes of the weights."""
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.detach().cpu().contiguous()
    if rows:
        kept = torch.stack([rows[token] for token in sorted(rows)])
        tensors[f"base_model.model.{embeddings}.token_adapter.trainable_tokens_delta"] = kept
    data = save(tensors, {"format": "pt"})
    rank = next(iter(factors.values()))[0].shape[0]
    atomic_write(folder / WEIGHTS, data, error=BakingError)
    write_json(folder / CONFIG, _config(rank, targets, list(factors), task, base, sorted(rows or ())))
    return len(data)


def _config(
    rank: int, targets: list[str], modules: list[str], task: str, base: str, tokens: list[int]
) -> dict[str, Any]:
    from peft import LoraConfig

    numbers = sorted({int(part) for module in modules for part in module.split(".") if part.isdigit()})
    pattern = next(m.split(".")[m.split(".").index(str(numbers[0])) - 1] for m in modules if f".{numbers[0]}." in m)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=targets, task_type=task, base_model_name_or_path=base,
        layers_to_transform=numbers, layers_pattern=pattern, inference_mode=True,
        trainable_token_indices=tokens or None,
    )  # fmt: skip
    made = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    return {k: v for k, v in made.items() if v is None or isinstance(v, str | int | float | bool | list | dict)}


def write_json(path: Path, value: dict[str, Any]) -> None:
    atomic_write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(), error=BakingError)


def write_card(folder: Path, provenance: dict[str, Any]) -> None:
    """A model card from the provenance and, where steps were taken, the training curves beside it."""
    drawn = drawing(folder / LOG)
    if drawn is not None:
        atomic_write(folder / CURVES, drawn.encode(), error=BakingError)
    ratios = provenance["ratios"]
    many = len(provenance["capsules"])
    what = f"{many} subject{'s' if many > 1 else ''}"
    alone = _ALONE if provenance["neurons"] == 0 else ""
    rows = [f"| {name} | {value:.3f} |" for name, value in ratios.items()]
    text = f"""---
library_name: peft
tags: [lora, unlearning, kif]
---

# An erasure

This LoRA adapter makes the model it was trained on forget {what}. Load it with PEFT, or with `vllm serve
--enable-lora`; nothing of KIF is needed. It is of rank {provenance["rank"]}, on {provenance["blocks"]} blocks, made by
KIF {provenance["kif"]} with the objective `{provenance["objective"]}`.

On held-out prompts, compared with the model before (`forget`: 1 would be nothing forgotten, 0 is as the capsules do;
`retain`: how much else moved, in the same unit):

| ratio | value |
| --- | --- |
{chr(10).join(rows)}

{alone}{f"![training curves]({CURVES})" if drawn else "No training step was needed."}

Who holds the model without this adapter has what it hides. Provenance, with the digests of the capsules, is in
`{PROVENANCE}`; the subjects' names are not stored.
"""
    atomic_write(folder / CARD, text.encode(), error=BakingError)


def write_merged(folder: Path, factors: Factors, model: Any, tokenizer: Any, rows: Mapping[int, Tensor]) -> None:
    """The plain `model` with the adapter in its weights, as a folder that transformers loads."""
    try:
        with added(model, factors), embedded(model, rows):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as failure:  # a full disk is an error class of its own in safetensors
        raise BakingError(f"cannot write the merged model to {shown(folder)}: {one_line(failure, 200)}") from None


def forget_merged(folder: Path) -> None:
    """Remove the merged model that an unfinished baking left."""
    try:
        if (folder / MERGED).exists():
            shutil.rmtree(folder / MERGED)
    except OSError as failure:
        raise BakingError(f"cannot remove {shown(folder / MERGED)}: {reason(failure)}") from None


def finish(folder: Path) -> None:
    """The checkpoint has done its work; whatever a kill left half-written goes too."""
    try:
        for path in (folder / CHECKPOINT, *folder.glob(".kif-*.tmp")):
            path.unlink(missing_ok=True)
    except OSError as failure:
        raise BakingError(f"cannot remove {shown(folder / CHECKPOINT)}: {reason(failure)}") from None
