"""Examples: texts to forget or to keep, as token ids, and batches of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

FORGET, RETAIN = "forget", "retain"


@dataclass(frozen=True)
class Example:
    """One text. ids: its tokens. start: where the completion begins; the tokens before it are the prompt.

    subject: the number of the subject it is about, −1 for retain text. name: positions of the tokens of the subject's
    name. alternative: the tokens of prompt and another completion, where an objective asked for one.
    """

    ids: tuple[int, ...]
    start: int = 0
    subject: int = -1
    name: tuple[int, ...] = ()
    alternative: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Batch:
    """Right-padded examples. ids, mask [B, T] int64; completion, name [B, T] bool: which tokens are of the completion
    and of the subject's name; subject [B] int64, −1 for retain text; index [B] int64: each example's number in its
    list, the same in every epoch.

    alternative: the same prompts with the other completions, None unless every example has one.
    """

    ids: Tensor
    mask: Tensor
    completion: Tensor
    name: Tensor
    subject: Tensor
    index: Tensor
    alternative: "Batch | None" = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        tensors = ("ids", "mask", "completion", "name", "subject", "index")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in tensors}
        alternative = self.alternative.to(device) if self.alternative is not None else None
        return replace(self, **moved, alternative=alternative)


def collate(examples: Sequence[Example], index: Sequence[int]) -> Batch:
    """`examples`, which are those numbered `index`, as one batch on the CPU."""
    batch = _padded([e.ids for e in examples], examples, index, named=True)
    others = [e.alternative for e in examples if e.alternative is not None]
    if len(others) < len(examples):
        return batch
    return replace(batch, alternative=_padded(others, examples, index, named=False))


def _padded(rows: Sequence[Sequence[int]], examples: Sequence[Example], index: Sequence[int], named: bool) -> Batch:
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    completion = torch.zeros(len(rows), longest, dtype=torch.bool)
    name, mask = torch.zeros_like(completion), torch.zeros_like(ids)
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        completion[i, example.start : len(row)] = True
        if named:
            name[i, list(example.name)] = True
    subject = torch.tensor([e.subject for e in examples])
    return Batch(ids, mask, completion, name, subject, torch.tensor(list(index)))


def batches(examples: Sequence[Example], rows: int = 32) -> Iterator[Batch]:
    """All examples, those of similar length together, on the CPU."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    for start in range(0, len(order), rows):
        chunk = order[start : start + rows]
        yield collate([examples[i] for i in chunk], chunk)
