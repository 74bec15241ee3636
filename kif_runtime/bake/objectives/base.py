"""What an objective is, and what the trainer gives it."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..examples import Batch, Example
from ..homes import Homes
from ..passes import Edit, Output, Passes
from ..settings import Settings


@dataclass(frozen=True)
class Step:
    """One step as an objective sees it, or a part of one: the trainer may split its rows over processes and over
    micro-batches, and averages the gradients by rows.

    forget, retain: batches on the model's device. number counts from 0 to total − 1. generator: seeded from the run's
    seed and the step, on the CPU. adapter: the adapter's trainable parameters by name.
    """

    passes: Passes
    forget: Batch
    retain: Batch
    number: int
    total: int
    generator: torch.Generator
    adapter: Mapping[str, nn.Parameter]

    def student(
        self, batch: Batch, *, hidden: Sequence[int] = (), logits: bool = False, edits: Mapping[int, Edit] | None = None
    ) -> Output:
        """The model with the adapter on; ask for block outputs, logits or both. Only what is asked for runs."""
        return self.passes.student(batch, hidden=hidden, logits=logits, edits=edits)

    def reference(
        self, batch: Batch, *, hidden: Sequence[int] = (), logits: bool = False, edits: Mapping[int, Edit] | None = None
    ) -> Output:
        """The same weights with the adapter off, no gradients."""
        return self.passes.reference(batch, hidden=hidden, logits=logits, edits=edits)

    def teacher(self, batch: Batch, *, hidden: Sequence[int] = (), logits: bool = False) -> Output:
        """The reference with the capsules at work, no gradients."""
        return self.passes.teacher(batch, hidden=hidden, logits=logits)


@dataclass(frozen=True)
class Setup:
    """What there is before the first step. forget, retain: all training examples. adapter: the adapter's parameters by
    name (`….layers.3.mlp.down_proj.lora_A.default.weight`); `Setup.layers` has the LoRA layers themselves.

    generator: seeded from the run's seed. tokenizer, capsules: as given to `bake`.
    """

    passes: Passes
    tokenizer: Any
    forget: Sequence[Example]
    retain: Sequence[Example]
    settings: Settings
    generator: torch.Generator
    adapter: Mapping[str, nn.Parameter]
    layers: Mapping[str, Any] = field(default_factory=dict)
    """Module path → peft LoRA layer: `lora_A["default"]`, `lora_B["default"]`, `get_base_layer()`, `scaling`."""
    homes: Homes = field(default_factory=dict)
    """Site → which block's MLP each of its signatures may be written into."""
    taken: Mapping[int, Tensor] = field(default_factory=dict)
    """Block → which neurons [F] of its MLP an earlier adapter, which this one goes on from, has made others."""


class Objective:
    """One way to forget. A subclass needs `loss`; the rest is for those that need more.

    `name` is what users call it by. Options are keyword arguments of the constructor. `alternatives` says what other
    completions its forget examples need: "teacher" (what the model answers with the capsules at work), "refusal", "own"
    (a second answer of the model itself, sampled), or None. `completions`: whether forget examples need the model's
    own completions; without, they are prompts alone and the completion is the whole text.
    """

    name: str
    alternatives: str | None = None
    completions: bool = True
    validated_at: str | None = "answers"
    """What early stopping looks at, and by what the best adapter is chosen: "answers" (next-token distributions, all
    blocks run), "states" (at the last home), both in comparison with the capsules at work; None: every step is taken
    and the last adapter kept, for objectives that aim elsewhere."""

    closed_form: bool = False
    """Whether `prepare` does all the work: then no step is taken, whatever the settings say."""

    writes_neurons: bool = False
    """Whether `prepare` may write signatures as neurons, for which the LoRA then needs a rank each."""

    neurons: int | None = None
    """How many signatures `prepare` wrote as neurons; None for an objective that does not try to."""

    def settings(self, last_site: int, blocks: int) -> Settings:
        """Defaults for a model of so many blocks whose capsules' last site is `last_site`. Asked for again after
        `prepare`: rank, blocks and targets are then what they were, and the schedule may be another."""
        return Settings()

    def prepare(self, setup: Setup) -> None:
        """Called once, before the first step: initialise the adapter, gather statistics, or do all the work where there
        is a closed form.

        It has to be deterministic. A run that goes on from a checkpoint calls it too, and then loads the adapter.
        """

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Named terms, already weighted; their sum is minimised.

        Each term is a mean over rows (of the forget batch, or of the retain batch) of a value per row, so that a step
        means the same however its rows are split.
        """
        raise NotImplementedError

    def after(self, step: Step) -> None:
        """Called after each update, on every process, with the last part of the step's rows."""

    def state(self) -> dict[str, Tensor]:
        """What has to be in a checkpoint beside the adapter and the optimiser. All processes have the same."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""

    def report(self) -> dict[str, Any]:
        """What `kif.json` says about it: its options, and what else is worth knowing. Plain JSON, nothing of subjects.

        Every argument of the constructor is an attribute of the same name.
        """
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def token_rows(self) -> dict[int, Tensor]:
        """Token → its new embedding [D], for an objective that changes some beside the LoRA. It has to put them to work
        itself; they are written into the adapter as PEFT's trainable tokens, which other readers of LoRA do not know.
        """
        return {}
