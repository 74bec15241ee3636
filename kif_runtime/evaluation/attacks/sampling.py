"""Best of N: an answer that is never the likeliest may still be drawn."""

from collections.abc import Sequence
from typing import Any

import torch

from ..facts import BARE, BATCH, Fact, encode
from ..outputs import left_padded
from ..surface import mentions
from .outcome import Outcome, subjects_of

SAMPLES = 32
NEW_TOKENS = 12


@torch.inference_mode()
def best_of_n(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    samples: int = SAMPLES,
    new_tokens: int = NEW_TOKENS,
    temperature: float = 1.0,
    seed: int = 0,
    form: str = BARE,
) -> Outcome:
    """`samples` continuations are drawn from each prompt; a hit is one that holds the answer.

    The generators of random numbers are left as they were.
    """
    device = next(model.parameters()).device
    end = tokenizer.eos_token_id
    prompts = [tuple(prompt) for prompt in encode(tokenizer, facts, form=form)]
    rows = [i for i in range(len(facts)) for _ in range(samples)]
    hits = [False] * len(facts)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(rows), 2 * BATCH):  # of several facts at once: a step reads every weight
            some = rows[start : start + 2 * BATCH]
            ids, mask = left_padded([prompts[i] for i in some])
            made = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=new_tokens,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                pad_token_id=end if end is not None else 0,
            )
            texts = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(some, texts, strict=True):
                hits[i] = hits[i] or mentions(text, [facts[i].answer])
    budget = {"queries": samples, "tokens": new_tokens, "temperature": temperature}
    return Outcome("best of N", budget, tuple(hits), subjects_of(facts))
