"""Capsules made by hand, and their files taken apart and put together with safetensors' own reader and writer."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from kif_runtime import Capsule, CapsuleError, Signature

D, BLOCKS = 12, 6
CALIBRATION = {
    "asked": 1e-5,
    "measured": 0.0,
    "tokens": 20480,
    "recall": 0.97,
    "tail": {"threshold": -3.5, "rate": 0.01, "shape": -0.125, "scale": 0.5},
    "positives": [-0.5, 1.25, 3.0],
}


def signature(site: int = 1, rank: int = 2, seed: int = 0, **changes) -> Signature:
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D, rank, generator=g, dtype=torch.float64))[0].T.float().contiguous()
    parts = {
        "site": site,
        "role": "last",
        "detector": torch.randn(D, generator=g),
        "bias": torch.tensor(-0.75),
        "basis": basis,
        "target": torch.zeros(rank),
        "strength": torch.tensor(1.0),
        "calibration": dict(CALIBRATION),
    }
    return Signature(**parts | changes)


def capsule(**changes) -> Capsule:
    soft = signature(3, rank=1, seed=1, gate="soft", k=1.6, tau=3.0, role="trace")
    parts = {
        "id": "new-york",
        "signatures": (signature(), soft),
        "model": hashlib.sha256(b"model").hexdigest(),
        "width": D,
        "blocks": BLOCKS,
        "calibration": {"note": "held out on 4 templates"},
        "provenance": {"kif": "0.1.0", "method": "fisher", "seeds": [1, 2]},
        "name": "New York",
        "aliases": ("NYC", "纽约"),
    }
    return Capsule(**parts | changes)


def file_parts(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The metadata and tensors as safetensors' own reader sees them."""
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["kif"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_parts(path: Path, meta: object, tensors: dict[str, torch.Tensor], **extra: str) -> None:
    text = meta if isinstance(meta, str) else json.dumps(meta)
    safetensors.torch.save_file(tensors, path, metadata={"kif": text} | extra)


def refusal(path: Path, model: str | None = None) -> str:
    """The one-line message that loading `path` is refused with."""
    with pytest.raises(CapsuleError) as caught:
        Capsule.load(path, model)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message
