"""Soft prompts: embeddings before the prompt, tuned on some facts so that others come out.

What is tuned on one half is judged on the other, so that nothing is counted which the attack put in itself. Sources:
Lester et al. (arXiv 2104.08691); Schwinn et al., Soft Prompt Threats (arXiv 2402.09063).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..facts import BARE, Fact, encode, first_token, padded
from .outcome import Asked, Outcome, asked_outcome, judged

LENGTH, STEPS, RATE = 8, 40, 0.3


def soft_prompt(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    length: int = LENGTH,
    steps: int = STEPS,
    rate: float = RATE,
    seed: int = 0,
    form: str = BARE,
) -> Outcome:
    """Twofold: `length` embeddings are tuned by Adam for `steps` full-batch steps on every second fact and judged on
    the others, and the other way round. They begin at random tokens' embeddings. rate: the step size, in standard
    deviations of the embedding matrix. Parameters are not touched. With one fact alone it is tuned on that fact itself,
    which measures what can be forced and not what is known: give two or more.
    """
    prompts = encode(tokenizer, facts, form=form)
    firsts = [first_token(tokenizer, fact.answer) for fact in facts]
    halves = [list(range(0, len(facts), 2)), list(range(1, len(facts), 2))] if len(facts) > 1 else [[0], [0]]
    asked: dict[int, Asked] = {}
    for tuned, judged_on in (halves, halves[::-1]):
        rows = [prompts[i] for i in tuned], [firsts[i] for i in tuned]
        soft = _tune(model, *rows, length=length, steps=steps, rate=rate, seed=seed)
        with torch.inference_mode():
            logits = _logits(model, soft, [prompts[i] for i in judged_on])
        asked |= zip(judged_on, judged(logits, [firsts[i] for i in judged_on]), strict=True)
    budget = {"embeddings": length, "steps": steps, "facts": len(halves[0])}
    return asked_outcome("soft prompt", budget, facts, [asked[i] for i in range(len(facts))])


def _tune(
    model: Any,
    prompts: Sequence[Sequence[int]],
    firsts: Sequence[int],
    *,
    length: int,
    steps: int,
    rate: float,
    seed: int,
) -> Tensor:
    """[length, D]."""
    table = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(table.shape[0], (length,), generator=generator)
    with torch.inference_mode(False), torch.enable_grad():
        soft = table.detach()[chosen.to(table.device)].clone().requires_grad_(True)
        targets = torch.tensor(firsts, device=table.device)
        optimiser = torch.optim.Adam([soft], lr=rate * float(table.detach().float().std()))
        for _ in range(steps):
            loss = torch.nn.functional.cross_entropy(_logits(model, soft, prompts).float(), targets)
            (soft.grad,) = torch.autograd.grad(loss, [soft])
            optimiser.step()
    return soft.detach()


def _logits(model: Any, soft: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor:
    """[B, V]: after each prompt, with `soft` before it."""
    ids, mask = padded(prompts)
    embedded = model.get_input_embeddings()(ids.to(soft.device)).detach()
    inputs = torch.cat([soft.to(embedded.dtype).expand(len(prompts), -1, -1), embedded], 1)
    whole = torch.cat([torch.ones(len(prompts), len(soft), dtype=mask.dtype), mask], 1).to(soft.device)
    logits = model(inputs_embeds=inputs, attention_mask=whole, use_cache=False).logits
    last = len(soft) + mask.sum(1) - 1
    return logits[torch.arange(len(prompts)), last]
