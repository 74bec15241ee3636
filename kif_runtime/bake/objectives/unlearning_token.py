"""The unlearning token of `unierase`: an embedding after which the model refuses."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BakingError, one_line
from ..examples import Example, collate
from .base import Setup
from .rows import spoken
from .tokens import mean_log_prob

RATE = 0.1  # of Adam, in units of the root mean square of what it moves
ROWS = 8  # of a step


def unused_token(tokenizer: Any, asked: str | None) -> tuple[str, int]:
    """A special token with its number, no end, padding or chat mark. Raises BakingError where there is none."""
    marks = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    free = [t for t in special if t not in marks and t not in str(tokenizer.chat_template)]
    if asked is not None and asked not in special:
        raise BakingError(f"{one_line(asked, 40)!r} is not a special token of this model; it has {', '.join(free)}")
    if asked is None and not free:
        raise BakingError(
            "this model has no unused special token to become the unlearning token; choose another objective"
        )
    chosen = asked or free[-1]
    return chosen, tokenizer.convert_tokens_to_ids(chosen)


def learn_token(setup: Setup, number: int, steps: int) -> Tensor:
    """Give the token `number` an embedding after which the model refuses, as a trainable token of the adapter."""
    row = token_row(setup.passes.model, number)
    follow = [
        Example((*e.ids[: e.start], number, *e.alternative[e.start :]), e.start + 1)
        for e in setup.forget
        if e.alternative is not None
    ]
    if not follow:
        raise BakingError("the forget examples have no refusal to lead to")
    drawn = [torch.randint(len(follow), (ROWS,), generator=setup.generator).tolist() for _ in range(steps)]

    def loss(step: int) -> Tensor:
        batch = collate([follow[i] for i in drawn[step]], drawn[step]).to(row.device)
        return -mean_log_prob(spoken(setup.passes.student(batch, logits=True)), batch.ids, batch.completion).mean()

    descend(row, loss, steps)
    return row


def token_row(model: Any, number: int) -> nn.Parameter:
    """The row [1, D] of `number` as a trainable token of the adapter, at first what it was."""
    from peft.utils import set_additional_trainable_modules

    config = model.peft_config["default"]
    config.trainable_token_indices = [number]
    base = model.get_base_model()
    set_additional_trainable_modules(base, config, base.config.to_dict(), "default")
    row: nn.Parameter = base.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    return row


def descend(x: Tensor, loss: Callable[[int], Tensor], steps: int, size: float | None = None) -> None:
    """Adam on `x` alone, in place; its rate is RATE · `size`, by default the root mean square of x."""
    rate = RATE * (float(x.detach().square().mean().sqrt()) if size is None else size)
    optimiser = torch.optim.Adam([x], lr=rate)
    for step in range(steps):
        with torch.enable_grad():
            (x.grad,) = torch.autograd.grad(loss(step), x)
        optimiser.step()
    x.grad = None
