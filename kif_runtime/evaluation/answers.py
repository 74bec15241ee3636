"""What a model says of a given answer, token by token; metrics of memorisation and membership are made of this."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import KifError, ModelError
from .facts import Progress, keeping, padded

BATCH = 8
PLAIN = "Question: {}\nAnswer: "  # where a tokenizer has no chat template


@dataclass(frozen=True, eq=False)
class Scored:
    """One answer y₁…y_T after its prompt; all tensors [T], fp32 but `best`.

    logp: log p(y_t | before). mean, deviation: of log p over the vocabulary, under p itself, the variance taken as at
    least 1e-6. best: whether y_t is the likeliest token. ended: whether y_T is the end token, which memorisation
    (`words`) leaves out.
    """

    logp: Tensor
    mean: Tensor
    deviation: Tensor
    best: Tensor
    ended: bool

    @property
    def loss(self) -> float:
        """ℓ = −mean log p, the end token included."""
        return -float(self.logp.double().mean())

    @property
    def words(self) -> "Scored":
        """The same without the end token."""
        if not self.ended:
            return self
        cut = slice(0, len(self.logp) - 1)
        return Scored(self.logp[cut], self.mean[cut], self.deviation[cut], self.best[cut], False)


def question(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a question up to where the answer begins (`question_text`)."""
    opened = question_text(tokenizer, text)
    return tokenizer(opened, add_special_tokens=not getattr(tokenizer, "chat_template", None))["input_ids"]


def question_text(tokenizer: Any, text: str) -> str:
    """One user turn of the chat template with the assistant's turn opened, or else "Question: …\\nAnswer: "."""
    if not getattr(tokenizer, "chat_template", None):
        return PLAIN.format(text)
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def answer(tokenizer: Any, text: str) -> list[int]:
    """The tokens of an answer and the end token. Raises KifError for an answer without tokens, or no end token."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids or tokenizer.eos_token_id is None:
        raise KifError(
            "an answer has no tokens, or the tokenizer no end token; mend the file, or use another tokenizer"
        )
    return [*ids, tokenizer.eos_token_id]


def score_answers(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = BATCH,
    progress: Progress | None = None,
) -> list[Scored]:
    """Per (question, answer): the answer's tokens and the end token, scored after the question. See `score_tokens`."""
    tokens = [(question(tokenizer, q), answer(tokenizer, a)) for q, a in pairs]
    return score_tokens(model, tokens, tokenizer.eos_token_id, batch_size=batch_size, progress=progress)


@torch.inference_mode()
def score_tokens(
    model: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    end: int | None = None,
    *,
    batch_size: int = BATCH,
    progress: Progress | None = None,
) -> list[Scored]:
    """Per (prompt, answer) of token ids, neither empty: the answer's tokens given all before them; softmax in fp32.

    end: the end token's id. Raises ModelError where the model gives numbers that are not finite.
    """
    found: list[Scored | None] = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    device = next(model.parameters()).device
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        ids, mask = padded([[*pairs[i][0], *pairs[i][1]] for i in some])
        kept = ids.shape[1] - min(len(pairs[i][0]) for i in some) + 1
        options = {"use_cache": False} | keeping(model, kept)
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), **options).logits
        first = ids.shape[1] - logits.shape[1]  # the position of the first row of logits
        for row, i in zip(logits, some, strict=True):
            prompt, wanted = pairs[i]
            at = len(prompt) - 1 - first
            found[i] = _scored(row[at : at + len(wanted)], wanted, end)
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order), "answers")
    return [one for one in found if one is not None]


def _scored(logits: Tensor, wanted: Sequence[int], end: int | None) -> Scored:
    """logits [T, V]."""
    log_p = logits.float().log_softmax(-1)
    if not torch.isfinite(log_p).all():
        raise ModelError("the model gives numbers that are not finite; check it, or load it with another dtype")
    p = log_p.exp()
    mean = (p * log_p).sum(-1)
    variance = (p * (log_p - mean[:, None]).square()).sum(-1).clamp(min=1e-6)
    targets = torch.tensor(wanted, device=logits.device)
    logp = log_p.gather(1, targets[:, None])[:, 0]
    best = log_p.argmax(-1) == targets
    return Scored(logp.cpu(), mean.cpu(), variance.sqrt().cpu(), best.cpu(), wanted[-1] == end)
