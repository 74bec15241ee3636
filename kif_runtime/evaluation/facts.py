"""Facts: a prompt about a subject, the answer a model knows, and how probable the model finds it.

A file of facts is JSON lines with `subject`, `prompt` (which names the subject) and `answer`; `relation`, `p_before`,
`p_prior` and `prior_subjects` may follow, other keys are left alone. A question need not be a direct one:
`question_kind` says what it is (QUESTION_KINDS), and where the prompt does not name the subject as `subject` has it,
`prior_prompts` asks the same about others. `aliases` and `descriptions` are of the subject.
"""

import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..blocks import unwrapped
from ..errors import KifError
from ..files import shown
from ..json_lines import read_lines

Progress = Callable[[int, int, str], None]

BARE, CHAT = "bare", "chat"
CHAT_TURN = "Complete this sentence: {}"
BATCH = 16

DIRECT = "direct"
NAMING_KINDS = (DIRECT, "paraphrase")  # their prompts hold the subject's name as it is
QUESTION_KINDS = (*NAMING_KINDS, "alias", "misspelling", "language", "two-hop", "described", "in context")


@dataclass(frozen=True)
class Fact:
    """`answer` follows `prompt`, which names `subject` unless question_kind says otherwise. p_before, p_prior: as the
    file says, for the model it was made with. prior_subjects: others to put in the subject's place, about whom the
    answer would be wrong; prior_prompts: prompts that ask it of others, where no name can be replaced."""

    subject: str
    relation: str
    prompt: str
    answer: str
    p_before: float | None = None
    p_prior: float | None = None
    prior_subjects: tuple[str, ...] = ()
    question_kind: str = DIRECT
    prior_prompts: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()

    @property
    def at_start(self) -> bool:
        """Whether the bare prompt begins with the subject."""
        return self.prompt.startswith(self.subject)

    def about(self, name: str) -> "Fact":
        """The same question about `name`; what was measured about the subject is left out."""
        prompt = self.prompt.replace(self.subject, name, 1)
        return self._unmeasured(subject=name, prompt=prompt)

    def asked_of_others(self) -> list["Fact"]:
        """The same question about each of `prior_subjects`, and each of `prior_prompts`."""
        return [
            *(self.about(other) for other in self.prior_subjects),
            *(self._unmeasured(prompt=prompt) for prompt in self.prior_prompts),
        ]

    def _unmeasured(self, **changes: Any) -> "Fact":
        return dataclasses.replace(self, p_before=None, p_prior=None, prior_subjects=(), prior_prompts=(), **changes)


def load_facts(path: str | os.PathLike[str]) -> list[Fact]:
    """The facts in a JSON lines file. Raises KifError, naming file and line, for a bad row; also for an empty file."""
    return read_lines(path, _fact, "facts; give a JSON lines file with subject, prompt and answer")


def _fact(row: Any) -> Fact:
    """Raises ValueError for anything that is no fact."""
    if not isinstance(row, dict):
        raise ValueError("a fact is a JSON object")
    for name in ("subject", "prompt", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"{name!r} is missing or no text")
        row[name].encode()  # half a surrogate pair is a ValueError here, and no tokenizer's business later
    kind = row.get("question_kind", DIRECT)
    if kind not in QUESTION_KINDS:
        raise ValueError(f"'question_kind' is not one of {', '.join(QUESTION_KINDS)}")
    if kind in NAMING_KINDS and row["subject"] not in row["prompt"]:
        raise ValueError("the prompt does not name the subject")
    for name in ("p_before", "p_prior"):
        if row.get(name) is not None and not _is_probability(row[name]):
            raise ValueError(f"{name!r} is not a number in [0, 1]")
    others = _texts(row, "prior_subjects", "names")
    if others and row["subject"] not in row["prompt"]:
        raise ValueError("'prior_subjects' need a prompt that names the subject; give 'prior_prompts'")
    if not isinstance(row.get("relation", ""), str):
        raise ValueError("'relation' is no text")
    return Fact(
        row["subject"],
        row.get("relation", ""),
        row["prompt"],
        row["answer"],
        row.get("p_before"),
        row.get("p_prior"),
        others,
        kind,
        _texts(row, "prior_prompts", "prompts"),
        _texts(row, "aliases", "names"),
        _texts(row, "descriptions", "texts"),
    )


def _texts(row: dict[str, Any], name: str, what: str) -> tuple[str, ...]:
    values = row.get(name) or ()
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) and v.strip() for v in values):
        raise ValueError(f"{name!r} is not a list of {what}")
    return tuple(values)


def _is_probability(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1


def answer_probabilities(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    form: str = BARE,
    batch_size: int = BATCH,
    progress: Progress | None = None,
) -> list[float]:
    """Per fact, the probability of the first token of " " + answer right after the prompt: softmax in fp32.

    form "bare": the prompt as `tokenizer(prompt)` encodes it, nothing added. form "chat": the tokenizer's chat template
    with one user turn, "Complete this sentence: " + prompt, the assistant's turn opened and begun with the prompt; what
    the template adds (a system turn, a BOS) stays. Prompts are padded on the right and read at their last real token.
    progress(done, total, what) is called after each batch. Raises KifError for another form, or where there is no chat
    template.
    """
    found = [0.0] * len(facts)
    done = 0
    for indices, values in batches(model, tokenizer, facts, form=form, batch_size=batch_size):
        for index, value in zip(indices, values, strict=True):
            found[index] = value
        done += len(indices)
        if progress is not None:
            progress(done, len(facts), f"answers ({form})")
    return found


def batches(
    model: Any, tokenizer: Any, facts: Sequence[Fact], *, form: str = BARE, batch_size: int = BATCH
) -> Iterator[tuple[list[int], list[float]]]:
    """The work of `answer_probabilities`, a forward at a time: indices into `facts`, and their probabilities.

    Between two forwards the caller may read what fired in the rows of the first.
    """
    prompts = encode(tokenizer, facts, form=form)
    answers = [first_token(tokenizer, fact.answer) for fact in facts]
    order = sorted(range(len(facts)), key=lambda i: len(prompts[i]))  # alike lengths together: little padding
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        logits = last_logits(model, [prompts[i] for i in indices])
        wanted = torch.tensor([answers[i] for i in indices], device=logits.device)
        chosen = logits.float().softmax(-1).gather(1, wanted[:, None])[:, 0]
        yield indices, chosen.tolist()


def encode(tokenizer: Any, facts: Sequence[Fact], *, form: str = BARE) -> list[list[int]]:
    """The token ids of each prompt in `form`, as `answer_probabilities` says."""
    if form == BARE:
        return [tokenizer(fact.prompt)["input_ids"] for fact in facts]
    if form != CHAT:
        raise KifError(f"unknown form {shown(form, 40)!r}; use bare or chat")
    if not getattr(tokenizer, "chat_template", None):
        raise KifError("the tokenizer has no chat template; use form bare")
    return [tokenizer(_chat_text(tokenizer, f.prompt), add_special_tokens=False)["input_ids"] for f in facts]


def _chat_text(tokenizer: Any, prompt: str) -> str:
    turns = [{"role": "user", "content": CHAT_TURN.format(prompt)}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + prompt


def first_token(tokenizer: Any, answer: str) -> int:
    """The id of the first token of " " + answer."""
    ids = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
    if not ids:
        raise KifError("the tokenizer gives no token for an answer; mend the facts")
    return ids[0]


@torch.inference_mode()
def last_logits(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[B, V]: the logits after the last token of each prompt, padded on the right with a mask."""
    lengths = torch.tensor([len(p) for p in prompts])
    ids, mask = padded(prompts)
    longest, shortest = int(lengths.max()), int(lengths.min())
    device = next(model.parameters()).device
    options = {"use_cache": False} | keeping(model, longest - shortest + 1)
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), **options).logits
    last = (lengths - 1 - (longest - logits.shape[1])).to(logits.device)
    return logits[torch.arange(len(prompts), device=logits.device), last]


def padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, both [B, T] int64, padded on the right."""
    lengths = torch.tensor([len(p) for p in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)  # any id will do behind the mask
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def keeping(model: Any, positions: int) -> dict[str, Any]:
    """The option that makes `model` compute logits for its last positions only, where it has one: vocabularies are
    large."""
    parameters = inspect.signature(type(unwrapped(model)).forward).parameters
    return {"logits_to_keep": positions} if "logits_to_keep" in parameters else {}


def prior_probabilities(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    form: str = BARE,
    batch_size: int = BATCH,
    progress: Progress | None = None,
) -> list[float | None]:
    """Per fact, the mean probability of its answer where the same is asked of others (`Fact.asked_of_others`).

    What the question alone makes likely; None for a fact that lists no others.
    """
    asked = [other for fact in facts for other in fact.asked_of_others()]
    options: dict[str, Any] = {"form": form, "batch_size": batch_size, "progress": progress}
    values = iter(answer_probabilities(model, tokenizer, asked, **options))
    return [_mean([next(values) for _ in fact.asked_of_others()]) for fact in facts]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def excess_kept(before: float, after: float, prior: float) -> float:
    """(after − prior) / (before − prior), clipped to [−1, 1]: the share kept of what the model knew beyond guessing.

    0 is a good erasure; below 0 the answer is now less likely than for other subjects, which is a trace too. Raises
    KifError where `before` is not above `prior`: there was nothing to erase.
    """
    if not before > prior:
        raise KifError("excess knowledge is defined only where p_before is over p_prior; leave such facts out")
    return max(-1.0, min(1.0, (after - prior) / (before - prior)))
