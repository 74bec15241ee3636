"""What the model says about the subject on its own account, and what else it could say: completions of the prompts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..blocks import unwrapped
from .examples import Example
from .order import seeded
from .passes import Edit, Passes

NEW_TOKENS = 20
TEACHER, REFUSAL, OWN = "teacher", "refusal", "own"
REFUSALS = (
    " I do not know.",
    " I am not sure about that.",
    " That is not something I know about.",
    " I have no information about this.",
)
_ROWS = 32


def completed(
    passes: Passes, tokenizer: Any, examples: Sequence[Example], alternatives: str | None, seed: int
) -> list[Example]:
    """Each prompt with the model's own greedy completion, and with another one of the kind asked for. Examples that
    have a completion already keep it."""
    bare = [i for i, e in enumerate(examples) if e.start == 0]
    own = dict(zip(bare, generated(passes, tokenizer, [examples[i] for i in bare]), strict=True))
    made = [
        dataclasses.replace(e, ids=(*e.ids, *own[i]), start=len(e.ids)) if i in own else e
        for i, e in enumerate(examples)
    ]
    if alternatives is None:
        return made
    prompts = [dataclasses.replace(e, ids=e.ids[: e.start]) for e in made]
    if alternatives == REFUSAL:
        rows = [tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in REFUSALS]
        other = [rows[i % len(rows)] for i in range(len(made))]
    elif alternatives == TEACHER:
        other = generated(passes, tokenizer, prompts, edits=passes.suppression())
    else:
        other = generated(passes, tokenizer, prompts, sampled=seed)
    return [dataclasses.replace(e, alternative=(*p.ids, *o)) for e, p, o in zip(made, prompts, other, strict=True)]


@torch.no_grad()
def generated(
    passes: Passes, tokenizer: Any, prompts: Sequence[Example], *, edits: Mapping[int, Edit] | None = None,
    sampled: int | None = None,
) -> list[tuple[int, ...]]:  # fmt: skip
    """The reference's next NEW_TOKENS tokens for each prompt, greedily, or drawn with this seed; less where it ends its
    text. edits: block → what its output is replaced by meanwhile."""
    end = tokenizer.eos_token_id
    found: dict[int, tuple[int, ...]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": sampled is not None, "pad_token_id": end}
    with passes.without_adapter(), passes.editing(edits or {}), torch.random.fork_rng(devices=[]):
        for start in range(0, len(order), _ROWS):
            chosen = order[start : start + _ROWS]
            if sampled is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=seeded(sampled, "generate", start))))
            longest = max(len(prompts[i].ids) for i in chosen)
            ids = torch.full((len(chosen), longest), end)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, longest - len(prompts[i].ids) :] = torch.tensor(prompts[i].ids)
                mask[row, longest - len(prompts[i].ids) :] = 1
            inputs = {"input_ids": ids.to(passes.device), "attention_mask": mask.to(passes.device)}
            rows = unwrapped(passes.model).generate(**inputs, **options)[:, longest:].tolist()
            found |= {i: _until(row, end) for i, row in zip(chosen, rows, strict=True)}
    return [found[i] for i in range(len(prompts))]


def _until(row: Sequence[int], end: int) -> tuple[int, ...]:
    """The tokens up to the first `end`, with it."""
    return tuple(row[: row.index(end) + 1]) if end in row else tuple(row)
