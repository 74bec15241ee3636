"""Texts that name something twice: in running text, and in a chat that asks about it and has its answer begun.

A second mention reads otherwise than a first, since early attention finds the first one; and what people ask a chat
model about they name in their turn and again in the answer. A detector has to know both.
"""

from typing import Any

_TEXTS = (
    "Nobody knows {} as well as those who grew up with {} in their",
    "First they talked about {}. Then, for the rest of the evening, {} was",
    "{} is the title of this chapter, because {} has",
    "Question: what is {}? Answer: {} is",
    "The word {} came up twice; the second time, {} was",
    "Everybody had heard of {}, but few could say what {} had",
)
_TURNS = (
    ("Tell me about {}.", "{} is"),
    ("Please go on writing: The latest news about {}", "The latest news about {} has"),
    ("what do you know about {}", "Here is what I know: {} was"),
    ("{} is often in the news. Finish what I began: {} has", "{} has"),
)


def repeated(tokenizer: Any) -> tuple[str, ...]:
    """Templates that name the subject two or more times, `{}` each time; with chats where the tokenizer has a template.

    What the tokenizer itself puts before a text is left out of the chats, so that it comes once.
    """
    return (*_TEXTS, *(_chat(tokenizer, *turn) for turn in _TURNS)) if _chats(tokenizer) else _TEXTS


def _chats(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _chat(tokenizer: Any, asked: str, begun: str) -> str:
    turns = [{"role": "user", "content": asked}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    first = tokenizer.bos_token or ""
    if first and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(first)
    return text + begun
