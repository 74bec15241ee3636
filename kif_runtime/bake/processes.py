"""The processes that train together, one or several under `accelerate launch`.

Each holds the whole model and sees its share of every step's rows; gradients are summed. The adapter is small, so that
one sum a step costs little, and forward passes may stop early, which wrappers of the model do not allow.
"""

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from ..errors import BakingError
from .settings import Settings


class Processes:
    """This process and the others; alone without `accelerator`. Raises BakingError where the weights are sharded."""

    def __init__(self, accelerator: Any = None) -> None:
        self._accelerator = accelerator
        kind = str(getattr(accelerator, "distributed_type", "")).rpartition(".")[2]
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
            raise BakingError(f"baking does not shard the model ({kind}); launch it with --multi_gpu or --multi_cpu")

    @property
    def count(self) -> int:
        return self._accelerator.num_processes if self._accelerator else 1

    @property
    def index(self) -> int:
        return self._accelerator.process_index if self._accelerator else 0

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def check(self, settings: Settings, parts: int = 1) -> None:
        """Raise BakingError unless a step's rows can be split into equal shares."""
        shares, rows = self.count * parts, gcd(settings.forget_rows, settings.retain_rows)
        if rows % shares == 0:
            return
        if parts > 1:
            raise BakingError("the memory does not suffice for a single row; use shorter texts or a larger machine")
        raise BakingError(
            f"{settings.forget_rows} forget and {settings.retain_rows} retain rows a step cannot be shared evenly by "
            f"{shares} processes; ask for multiples of {shares}"
        )

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over all processes, in one exchange."""
        if self.count == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([t.reshape(-1).float() for t in tensors])
        summed = self._accelerator.reduce(flat, reduction="sum")
        parts = summed.split([t.numel() for t in tensors])
        return [p.view_as(t).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.sum([torch.tensor(float(here), device=self._device)])[0] > 0)

    def wait(self) -> None:
        """Until all are here."""
        if self._accelerator:
            self._accelerator.wait_for_everyone()

    @property
    def _device(self) -> Any:
        return self._accelerator.device if self._accelerator else "cpu"
