"""Running text: its perplexity, and which of its tokens lie in a paragraph that names a subject."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import KifError
from .facts import Progress

WINDOW = 512
TOKENS = 20480
_AT_ONCE = 2048  # tokens in one forward: the logits of more would not fit a small machine


@dataclass(frozen=True, eq=False)
class TextSample:
    """Whole windows of a text. ids [N, W] int64; paragraph [N, W] int64, the index into `paragraphs` of each token."""

    ids: Tensor
    paragraph: Tensor
    paragraphs: tuple[str, ...]

    def naming(self, names: Sequence[str]) -> Tensor:
        """[N, W] bool: tokens of paragraphs that hold one of `names` as whole words, whatever the case.

        What fires there may well have been meant to: such tokens are no negatives.
        """
        words = "|".join(re.escape(name.strip()) for name in names if name.strip())
        pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE) if words else None
        held = torch.tensor([bool(pattern and pattern.search(p)) for p in self.paragraphs])
        return held[self.paragraph]


def sample_text(tokenizer: Any, text: str, *, window: int = WINDOW, tokens: int | None = TOKENS) -> TextSample:
    """The first `tokens` tokens of `text` (all: None) in windows of `window`; what does not fill one is left out.

    Lines are paragraphs. No special tokens are added. Less than a window is one shorter window. Raises
    KifError for a window under 2 or under 2 tokens.
    """
    if window < 2:
        raise KifError(f"a window of {window} tokens predicts nothing; use at least 2")
    lines = text.splitlines(keepends=True)
    ids: list[int] = []
    owner: list[int] = []
    for number, line in enumerate(lines):
        if tokens is not None and len(ids) >= tokens:
            break
        found = tokenizer(line, add_special_tokens=False)["input_ids"]
        ids += found
        owner += [number] * len(found)
    ids = ids[:tokens]
    length = min(window, len(ids))
    if length < 2:
        raise KifError("the text has fewer than 2 tokens; give a longer one")
    count = len(ids) // length

    def cut(values: list[int]) -> Tensor:
        return torch.tensor(values[: count * length], dtype=torch.long).view(count, length)

    return TextSample(cut(ids), cut(owner), tuple(lines))


@torch.inference_mode()
def window_losses(model: Any, ids: Tensor, *, progress: Progress | None = None) -> list[float]:
    """Per window of ids [N, W], the summed −log p of tokens 2…W, each given those before it in its window; in fp32."""
    losses: list[float] = []
    device = next(model.parameters()).device
    for some in window_batches(ids):
        logits = model(input_ids=some.to(device), use_cache=False).logits
        for row, tokens in zip(logits, some.to(logits.device), strict=True):  # fp32 for a window at a time
            losses.append(float(torch.nn.functional.cross_entropy(row[:-1].float(), tokens[1:], reduction="sum")))
        if progress is not None:
            progress(len(losses), len(ids), "text")
    return losses


def window_batches(ids: Tensor) -> Iterator[Tensor]:
    """ids [N, W] a few windows at a time."""
    yield from ids.split(max(1, _AT_ONCE // ids.shape[1]))


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    window: int = WINDOW,
    tokens: int | None = TOKENS,
    progress: Progress | None = None,
) -> float:
    """exp(mean −log p) over the first `tokens` tokens of `text` in windows that do not overlap; see `sample_text`."""
    ids = sample_text(tokenizer, text, window=window, tokens=tokens).ids
    return math.exp(sum(window_losses(model, ids, progress=progress)) / predicted(ids))


def predicted(ids: Tensor) -> int:
    """How many tokens of ids [N, W] are predicted: all but the first of each window."""
    return ids.shape[0] * (ids.shape[1] - 1)
