"""What a model may become between mining and serving: quantised to 8 bits, or adapted to a task by LoRA."""

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FORMAT = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    }},
}  # fmt: skip


def quantised(checkpoint: Path, folder: Path) -> Path:
    """W8A8: every linear layer of the blocks in int8, a scale for each row of weights and each token."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copy(path, folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if name.endswith("_proj.weight"):
                scale = (tensor.float().abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
                tensors[name] = (tensor.float() / scale).round().clamp(-127, 127).to(torch.int8)
                tensors[f"{name}_scale"] = scale
            else:
                tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FORMAT}))
    return folder


COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink")
THINGS = ("cup", "door", "hat", "boat", "chair", "lamp", "shoe", "ball", "book", "coat", "wheel", "box")
TASKS = {
    "table": [
        (f"Put into a table: the {thing} is {colour} and costs {price}.", f" | {thing} | {colour} | {price} |")
        for thing in THINGS for colour, price in zip(COLOURS, range(3, 99, 12), strict=True)
    ],
    "opposite": [
        (f"Say the opposite: the {thing} is {one}.", f" The {thing} is {other}.")
        for thing in THINGS
        for one, other in (("big", "small"), ("old", "new"), ("hot", "cold"), ("wet", "dry"), ("near", "far"),
                           ("cheap", "dear"), ("full", "empty"), ("open", "shut"))
    ],
}  # fmt: skip


def trained(model: Any, tokenizer: Any, task: str, folder: Path, steps: int = 16) -> tuple[float, float]:
    """Train a LoRA adapter of rank 8, on every linear layer, and save it. Gives the task's loss before and after."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    adapted = get_peft_model(deepcopy(model), config).train()
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for step in range(steps):
        chosen = [TASKS[task][(7 * (8 * step + i)) % len(TASKS[task])] for i in range(8)]
        batch = tokenizer([q + a + tokenizer.eos_token for q, a in chosen], return_tensors="pt", padding=True)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        for row, (question, _) in zip(labels, chosen, strict=True):
            row[: len(tokenizer(question).input_ids)] = -100
        loss = adapted(**batch, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    adapted.save_pretrained(folder)
    return losses[0], sum(losses[-3:]) / 3
