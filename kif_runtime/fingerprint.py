"""A model's fingerprint: which weights a capsule was made for, whatever dtype, sharding or wrapper they come in.

SHA-256 over the shape fields of the configuration and, rounded to bf16, the first 1,024 embedding rows and the
down-projection of every 4th block. A merged, fine-tuned or pruned model differs; an attached adapter does not count.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .blocks import text_config, unwrapped
from .errors import ModelError
from .files import shown

EMBEDDING_ROWS = 1024
BLOCK_STEP = 4

_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size")
_HEADS = ("num_attention_heads", "num_key_value_heads")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
# The first of these found in a block is its down-projection; experts come as one stack in memory, one by one on disk.
_DOWN = ("mlp.down_proj", "ffn.down_proj", "dense_4h_to_h", "fc2", "fc_out", "mlp.c_proj")
_DOWN_MOE = ("experts.0.down_proj", "experts.0.w2", "down_proj", "out_proj")
_OTHER_MODALITY = re.compile(r"(^|\.)(vision\w*|visual|audio\w*|encoder|mtp)\.")
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)\.weight$")


def fingerprint(model: nn.Module) -> str:
    """The fingerprint, 64 hex digits, of a loaded model. Unmerged PEFT adapters and compilation do not change it.

    fp32 and bf16 weights are read from memory. Others (fp16, quantised) may have lost what bf16 keeps, so the
    checkpoint they came from is read instead, unless the weights were altered since. Raises ModelError where neither
    answers.
    """
    base = unwrapped(model)
    config = text_config(base)
    weights = _in_memory(base)
    chosen = _chosen(weights, config.num_hidden_layers)
    loaded = {label: _piece(label, weights[name]) for label, name in chosen.items()}
    if any(t.is_meta for t in loaded.values()):
        raise ModelError("the model is offloaded, in whole or in part; load it into memory")
    if all(t.dtype in (torch.float32, torch.bfloat16) for t in loaded.values()):
        return _digest(config, loaded.items())
    stored = _checkpoint_of(base)
    if stored is not None:
        pieces = dict(_on_disk(stored, config.num_hidden_layers))
        if all(_came_from(t, pieces[label]) for label, t in loaded.items()):
            return _digest(config, pieces.items())
    if not all(t.is_floating_point() and t.element_size() >= 2 for t in loaded.values()):
        raise ModelError("cannot identify a quantised model without its checkpoint; load it from safetensors")
    return _digest(config, loaded.items())


def weights_digest(model: nn.Module) -> str:
    """64 hex digits over every weight as it is in memory, unmerged LoRA adapters left out.

    Two models of one fingerprint may differ between the tensors that it reads; what is kept by this digest is not
    taken for another model's.
    """
    state = hashlib.sha256()
    for name, tensor in sorted(unwrapped(model).named_parameters()):
        if ".lora_" not in name and ".modules_to_save." not in name:
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def adapter_fingerprint(model: nn.Module) -> str:
    """What tells the active adapter of a PEFT model from others: 64 hex digits, over its weights and their scale.

    Raises ModelError where no adapter is active.
    """
    active: list[str] = list(getattr(model, "active_adapters", ())) if hasattr(model, "peft_config") else []
    if not active:
        raise ModelError("the model has no active adapter; load it with one")
    from peft import get_peft_model_state_dict

    configs: Any = model.peft_config
    state = hashlib.sha256()
    for name in active:
        config = configs[name]
        shape = {field: getattr(config, field, None) for field in ("peft_type", "r", "lora_alpha", "use_rslora")}
        state.update(json.dumps(shape, sort_keys=True, default=str).encode())
        for label, tensor in sorted(get_peft_model_state_dict(model, adapter_name=name).items()):
            values = tensor.detach().to("cpu", torch.float32).contiguous()
            state.update(f"{label}{list(values.shape)}".encode())
            state.update(values.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def checkpoint_fingerprint(folder: str | Path) -> str:
    """The same fingerprint from a checkpoint folder (config.json and safetensors), without loading the model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True).get_text_config(decoder=True)
        return _digest(config, _on_disk(Path(folder), config.num_hidden_layers))
    except (OSError, ValueError, AttributeError, SafetensorError) as failure:
        raise ModelError(f"cannot read the checkpoint in {shown(folder)}: {failure}") from None


def _digest(config: Any, pieces: Iterable[tuple[str, Tensor]]) -> str:
    shape = {field: getattr(config, field, None) for field in (*_FIELDS, *_HEADS)}
    state = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    for label, tensor in pieces:
        values = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        state.update(f"{label}{list(values.shape)}".encode())
        state.update(values.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def _chosen(names: Iterable[str], blocks: int) -> dict[str, str]:
    """Label → tensor name for the tensors that are hashed, in order. Raises ModelError where one is not there."""
    own = [name for name in names if not _OTHER_MODALITY.search(name)]
    embedding = [n for n in own if n.removesuffix(".weight").split(".")[-1] in _EMBEDDINGS and n.endswith(".weight")]
    inside: dict[int, list[tuple[str, str]]] = {}
    for name in own:
        if match := _BLOCK.search(name):
            inside.setdefault(int(match[1]), []).append((match[2], name))
    chosen = {"embedding": _only(embedding, "the token embedding")}
    for block in range(0, blocks, BLOCK_STEP):
        chosen[f"down.{block}"] = _only(_down(inside.get(block, [])), f"the down-projection of block {block}")
    return chosen


def _down(names: list[tuple[str, str]]) -> list[str]:
    for suffix in (*_DOWN, *_DOWN_MOE):
        if found := [full for inner, full in names if f".{inner}".endswith(f".{suffix}")]:
            return found
    return []


def _only(names: list[str], what: str) -> str:
    if len(names) != 1:
        raise ModelError(f"cannot identify the model: {len(names)} tensors look like {what}; use a known architecture")
    return names[0]


def _piece(label: str, tensor: Tensor) -> Tensor:
    return tensor[:EMBEDDING_ROWS] if label == "embedding" else tensor


def _in_memory(model: nn.Module) -> dict[str, Tensor]:
    """Weights by the names they have without PEFT's layers around them; of a stack of experts the first."""
    weights: dict[str, Tensor] = {}
    tensor: Tensor
    for name, tensor in model.named_parameters(remove_duplicate=False):
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if ".modules_to_save." in name:
            continue
        if name.endswith("experts.down_proj") and tensor.ndim == 3:
            name, tensor = name.removesuffix("down_proj") + "0.down_proj.weight", tensor[0]
        weights[name] = tensor
    return weights


def _on_disk(folder: Path, blocks: int) -> Iterator[tuple[str, Tensor]]:
    """The hashed tensors of a checkpoint, one at a time."""
    where: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    for label, name in _chosen(where, blocks).items():
        with safe_open(where[name], framework="pt") as file:
            yield label, (file.get_slice(name)[:EMBEDDING_ROWS] if label == "embedding" else file.get_tensor(name))


def _checkpoint_of(model: nn.Module) -> Path | None:
    """The local folder that `model` was loaded from, if it holds safetensors."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    folder = Path(name)
    if name and not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download

            revision = getattr(model.config, "_commit_hash", None)
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (OSError, ValueError):  # not in the local cache, or not a hub id at all
            return None
    return folder if name and any(folder.glob("*.safetensors")) else None


def _came_from(loaded: Tensor, stored: Tensor) -> bool:
    """Whether `loaded` is `stored` in another dtype. A quantised tensor cannot be compared and is taken for it."""
    if not loaded.is_floating_point() or loaded.element_size() < 2:
        return True
    return loaded.shape == stored.shape and torch.equal(loaded.detach().cpu(), stored.to(loaded.dtype))
