"""Tuned configurations as data."""

import torch

LONGEST_CHUNK = 64


def row_config(width: int, chunk: int, dtype: torch.dtype) -> dict[str, int]:
    return {"BLOCK": min(chunk, 2), "num_warps": max(1, min(16, width // 512))}
