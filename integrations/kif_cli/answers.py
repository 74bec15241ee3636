"""Asking a model: a prompt as it stands or through the chat template, and the text that follows."""

from dataclasses import dataclass
from typing import Any

import torch

from kif_runtime.blocks import text_config, unwrapped
from kif_runtime.errors import RequestError


@dataclass(frozen=True)
class How:
    """How text is generated. Greedy unless `sample`; `seed` makes sampling repeatable."""

    max_new_tokens: int = 64
    sample: bool = False
    seed: int | None = None
    chat: bool = False


def encode(model: Any, tokenizer: Any, prompt: str, *, chat: bool = False, room: int = 0) -> Any:
    """[1, T] token ids on the model's device.

    Raises RequestError where the prompt is empty or, with `room` more tokens, too long for the model.
    """
    if not prompt.strip():
        raise RequestError("the prompt is empty; give some text")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise RequestError("this model's tokenizer has no chat template; leave --chat out")
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    limit = getattr(text_config(unwrapped(model)), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + room > limit:
        more = f" and {room} new ones" if room else ""
        raise RequestError(f"the prompt has {ids.shape[1]:,} tokens{more}; the model takes {limit:,}, shorten it")
    return ids.to(model.device)


def answer(model: Any, tokenizer: Any, prompt: str, how: How) -> str:
    """The text after `prompt`. One prompt at a time, so that an answer does not depend on the others."""
    ids = encode(model, tokenizer, prompt, chat=how.chat, room=how.max_new_tokens)
    if how.seed is not None:
        torch.manual_seed(how.seed)
    with torch.inference_mode():
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=how.max_new_tokens,
            do_sample=how.sample,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
