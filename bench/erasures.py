"""Erasures of one subject that the audit compares, KIF's own and those of others, each as a state of the same model.

| name | what is done | who holds the weights |
| --- | --- | --- |
| untouched | nothing | |
| prompt only | a system turn before everything says not to speak about the subject | leaves it out |
| projection | what the capsule's bases span is projected out of every token at their sites, no gate | takes it off |
| LEACE | the least change at the capsule's site after which nothing linear tells the name's tokens | takes it off |
| heretic | the capsule's direction is projected out of every matrix that writes into the stream | has only that |
| NPO, SimNPO, RMU | an adapter is trained by that objective, and merged | has only that |
| KIF gate | the capsule is attached | takes it off |
| KIF baked | the capsule is baked into an adapter, which is merged | has only that |

Sources: LEACE, Belrose et al. (arXiv 2306.03819), by the authors' package; the objectives' are named in
`kif_runtime.bake.objectives`.
"""

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import digest
from torch import Tensor

from kif_hf import attach
from kif_runtime import Capsule, KifError
from kif_runtime.bake import bake
from kif_runtime.evaluation.attacks.restoration import removed_directions
from kif_runtime.evaluation.attacks.weights import Edit, edited
from kif_runtime.evaluation.states import Running, State, bare
from kif_runtime.mining import prepare
from kif_runtime.mining.reading import Reader, undisturbed
from kif_runtime.mining.subject import find_subject

UNTOUCHED = "untouched"
OBJECTIVES = {"heretic": "orthogonal", "NPO": "npo", "SimNPO": "simnpo", "RMU": "rmu", "KIF baked": "capsule"}
METHODS = (UNTOUCHED, "prompt only", "projection", "LEACE", "heretic", "NPO", "SimNPO", "RMU", "KIF gate", "KIF baked")
INSTRUCTION = (
    "Do not say anything about {0}. If you are asked about {0}, or a text goes on to tell something about {0}, say "
    "that you do not know."
)
EVERY = 8  # of the controls' texts, so many are passed over for one that LEACE is fitted on


class Erasures:
    """The erasures of one subject. folder: where adapters are trained. settings: of the training, for all objectives
    alike."""

    def __init__(
        self, model: Any, tokenizer: Any, name: str, capsule: Capsule, folder: Path, settings: dict[str, Any], seed: int
    ) -> None:
        self.model, self.tokenizer, self.name, self.capsule = model, tokenizer, name, capsule
        self.folder, self.settings, self.seed = folder, settings, seed

    def state(self, method: str) -> State:
        """The model with `method` done to it. Raises KifError for an unknown one."""
        made: dict[str, Callable[[], State]] = {
            UNTOUCHED: lambda: bare(self.model, "after"),
            "prompt only": lambda: self._removable(method, lambda: instructed(self.model, self._instruction())),
            "projection": lambda: self._edited(method, projections(self.capsule)),
            "LEACE": lambda: self._edited(method, leace(self.model, self.tokenizer, self.name, self.capsule)),
            "KIF gate": self._gate,
        }
        if method in OBJECTIVES:
            return bare(self._baked(OBJECTIVES[method]), "after")
        if method not in made:
            raise KifError(f"unknown method {method!r}; choose among {', '.join(METHODS)}")
        return made[method]()

    def _removable(self, method: str, enter: Callable[[], Any]) -> State:
        key = digest([method, self.name, self.capsule.digest])
        return State("after", enter, key, removable=True)

    def _edited(self, method: str, edits: dict[int, Edit]) -> State:
        @contextmanager
        def enter() -> Iterator[Any]:
            with edited(self.model, edits):
                yield self.model

        return self._removable(method, enter)

    def _gate(self) -> State:
        @contextmanager
        def enter() -> Iterator[Running]:
            with attach(self.model, [self.capsule]) as gate:
                yield Running(self.model, gate)

        return State("after", enter, self.capsule.digest, True, (self.capsule,))

    def _instruction(self) -> list[int]:
        return system_turn(self.tokenizer, INSTRUCTION.format(self.name))

    def _baked(self, objective: str) -> Any:
        """A copy of the model with the adapter in its weights, by PEFT alone."""
        from peft import PeftModel

        out = self.folder / f"{objective}-{self.capsule.id}"
        with torch.inference_mode(False), torch.enable_grad():
            bake(
                self.model, self.tokenizer, [self.capsule], out, names={self.capsule.id: [self.name]},
                objective=objective, settings=self.settings, seed=self.seed,
            )  # fmt: skip
        merged = PeftModel.from_pretrained(copy.deepcopy(self.model), out).merge_and_unload().eval()
        shutil.rmtree(out)
        return merged


def projections(capsule: Capsule) -> dict[int, Edit]:
    """x ← x − UᵀU x at each site of the capsule, for every token; U are all its directions there."""

    def away(basis: Tensor) -> Edit:
        return lambda x: (x.float() - (x.float() @ basis.T) @ basis).to(x.dtype)

    return {site: away(basis) for site, basis in removed_directions([capsule]).items()}


def leace(model: Any, tokenizer: Any, name: str, capsule: Capsule) -> dict[int, Edit]:
    """LEACE at the capsule's last site, for every token. The concept is whether a token is one of the name.

    It is fitted on the texts that the capsule was mined from, the tokens of the name against those of near misses and
    of every so many control texts. What follows the name may speak of it too, and is on neither side; nor is a text's
    first token, whose state the attention sink takes up.
    """
    try:
        from concept_erasure import LeaceFitter
    except ImportError:
        raise KifError("LEACE is taken from its authors; pip install --no-deps concept-erasure") from None
    site = max(capsule.sites)
    with undisturbed(model):
        control = prepare(model, tokenizer, site=site)
        reader = Reader(model, tokenizer)
        subject = find_subject(reader, control, (name,), capsule.calibration.get("kind"), None, None)
        rows = subject.read(reader, site)
        silent = [text for text in control.texts if name.casefold() not in text.casefold()]
        others = reader.states([*subject.near, *silent[::EVERY]], site)
    own = torch.cat([x[[i for i in span if i > 0]] for x, span in zip(rows, subject.spans, strict=True)])
    states = torch.cat([own, *(x[1:] for x in others)]).double()
    concept = torch.zeros(len(states), 1, dtype=torch.float64)
    concept[: len(own)] = 1.0
    eraser = LeaceFitter.fit(states, concept).eraser
    left, right, mean = (t.float() for t in (eraser.proj_left, eraser.proj_right, eraser.bias))
    return {site: lambda x: (x.float() - ((x.float() - mean) @ right.T) @ left.T).to(x.dtype)}


def system_turn(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a system turn that says `text`, and of what stands before it in the tokenizer's template."""
    turns = [{"role": "system", "content": text}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False) if tokenizer.chat_template else f"{text}\n\n"
    return tokenizer(whole, add_special_tokens=False)["input_ids"]


@contextmanager
def instructed(model: Any, instruction: Sequence[int]) -> Iterator[Any]:
    """Inside the block every sequence is read as if `instruction` stood before it; positions count from it.

    Its keys and values are put into the cache of each forward that begins a sequence, so whoever looks at tokens and
    states sees only those of the sequence.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    with torch.no_grad():
        read = model(input_ids=torch.tensor([list(instruction)], device=device), use_cache=True).past_key_values
    kept = [(layer.keys, layer.values) for layer in read.layers]

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs["inputs_embeds"] if given is None else given
        rows, tokens = given.shape[:2]
        cache = kwargs.get("past_key_values")
        cache = DynamicCache(config=module.config) if cache is None else cache
        if not cache.get_seq_length():
            for layer, (keys, values) in enumerate(kept):
                cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        whole = cache.get_seq_length() + tokens
        mask = kwargs.get("attention_mask")
        mask = torch.ones(rows, whole - len(instruction), dtype=torch.long, device=device) if mask is None else mask
        mask = torch.cat([mask.new_ones(rows, len(instruction)), mask], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        kwargs.pop("cache_position", None)
        return args, kwargs | {"past_key_values": cache, "attention_mask": mask, "position_ids": places}

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield model
    finally:
        handle.remove()
