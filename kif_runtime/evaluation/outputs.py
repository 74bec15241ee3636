"""What a model gives for a prompt, and a store of it, so that suites which ask the same pay for one forward.

A `Reading` is one forward over a prompt: what follows it, and the state of its last token after every block. A
`Continuation` is what the model goes on to say, greedily.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..blocks import decoder_blocks
from ..errors import ModelError
from .facts import BATCH, last_logits

ROOM = 1 << 30  # bytes of readings kept; the oldest go first
Prompt = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Reading:
    """log_probs [V] fp32: of the token after the prompt. blocks [L, D] fp32: each decoder block's output there."""

    log_probs: Tensor
    blocks: Tensor

    @property
    def nbytes(self) -> int:
        return self.log_probs.nbytes + self.blocks.nbytes


@dataclass(frozen=True)
class Continuation:
    """Greedy tokens up to and with the first end token, at most as many as asked for; their text; and `mass`, per step
    the probability of the watched tokens together."""

    ids: tuple[int, ...]
    text: str
    mass: tuple[float, ...]


def _one(value: Any) -> int:
    return 1


class Outputs:
    """A store by state and prompt, or by state and attack. `asked` and `saved` count prompts; what was saved needed no
    forward."""

    def __init__(self, room: int = ROOM) -> None:
        self.asked = self.saved = 0
        self._room, self._used = room, 0
        self._kept: OrderedDict[Any, Any] = OrderedDict()

    def get(
        self, keys: Sequence[Any], make: Callable[[list[int]], Sequence[Any]], *, prompts: Callable[[Any], int] = _one
    ) -> list:
        """The value of each key; `make(indices)` gives those that are missing, in the order of their indices.

        A key that stands twice is made once. prompts(value): how many prompts it took to make a value, if not one.
        """
        missing = list({key: i for i, key in reversed(list(enumerate(keys))) if key not in self._kept}.values())
        missing.sort()
        made = {keys[i]: value for i, value in zip(missing, make(missing), strict=True)} if missing else {}
        values = [made[key] if key in made else self._kept[key] for key in keys]
        took = sum(map(prompts, values))
        self.asked += took
        self.saved += took - sum(map(prompts, made.values()))
        for key, value in made.items():
            self._keep(key, value)
        return values

    def of(self, identity: Sequence[str]) -> dict[Any, Any]:
        """What is kept of one state, by key; `take` puts it into another store."""
        return {key: value for key, value in self._kept.items() if key[: len(identity)] == tuple(identity)}

    def take(self, kept: Mapping[Any, Any]) -> None:
        for key, value in kept.items():
            self._keep(key, value)

    def _keep(self, key: Any, value: Any) -> None:
        self._kept[key] = value
        self._used += getattr(value, "nbytes", 0)
        while self._used > self._room and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self._used -= getattr(old, "nbytes", 0)


@torch.inference_mode()
def read(model: Any, prompts: Sequence[Prompt], *, batch_size: int = BATCH) -> list[Reading]:
    """A reading of each prompt, as if it had been alone: padded on the right, read at its last real token.

    Raises ModelError where the model gives numbers that are not finite.
    """
    found: list[Reading | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        last = [len(prompts[i]) - 1 for i in some]
        with last_states(model, last) as states:
            logits = last_logits(model, [prompts[i] for i in some])
        log_probs = logits.float().log_softmax(-1).cpu()
        blocks = torch.stack(states, 1).float().cpu()  # [B, L, D]
        if not (torch.isfinite(log_probs).all() and torch.isfinite(blocks).all()):
            raise ModelError("the model gives numbers that are not finite; check it, or load it with another dtype")
        for row, i in enumerate(some):
            found[i] = Reading(log_probs[row].clone(), blocks[row].clone())
    return [reading for reading in found if reading is not None]


class last_states:
    """Inside the block, a list that every forward fills with each decoder block's output at `last`: [B, D] a block."""

    def __init__(self, model: Any, last: Sequence[int]) -> None:
        self._blocks, self._last = decoder_blocks(model), torch.tensor(last)
        self._states: list[Tensor] = []

    def __enter__(self) -> list[Tensor]:
        self._handles = [block.register_forward_hook(self._note) for block in self._blocks]
        return self._states

    def _note(self, module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._states.append(hidden[torch.arange(len(hidden), device=hidden.device), self._last.to(hidden.device)])

    def __exit__(self, *failure: object) -> None:
        for handle in self._handles:
            handle.remove()


@torch.inference_mode()
def go_on(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    new_tokens: int,
    watch: Sequence[Sequence[int]] | None = None,
    *,
    batch_size: int = BATCH,
) -> list[Continuation]:
    """The greedy continuation of each prompt. watch: per prompt, the token ids whose probability is added up in `mass`.

    Prompts of a batch are padded on the left. Raises ModelError where the model gives numbers that are not finite.
    """
    found: list[Continuation | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    ends = _ends(model, tokenizer)
    device = next(model.parameters()).device
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        ids, mask = left_padded([prompts[i] for i in some])
        made = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=min(ends, default=0),
            return_dict_in_generate=True,
            output_logits=True,
        )
        steps = [step.float().softmax(-1) for step in made.logits]
        if not all(torch.isfinite(step).all() for step in steps):
            raise ModelError("the model gives numbers that are not finite; check it, or load it with another dtype")
        for row, i in enumerate(some):
            tokens = _until_end(made.sequences[row, ids.shape[1] :].tolist(), ends)
            seen = list(watch[i]) if watch is not None else []
            mass = tuple(float(step[row, seen].sum()) for step in steps[: len(tokens)])
            found[i] = Continuation(tuple(tokens), tokenizer.decode(tokens, skip_special_tokens=True), mass)
    return [one for one in found if one is not None]


def _ends(model: Any, tokenizer: Any) -> set[int]:
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if named is not None else tokenizer.eos_token_id
    return set(named) if isinstance(named, list | tuple) else {named} - {None}


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    stop = next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))
    return tokens[:stop]


def left_padded(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """ids and mask, both [B, T] int64."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
