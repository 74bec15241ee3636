"""An audit: the models that are compared, what is asked of them, and how much work it may be. Suites are given one.

A suite is a function `run(audit) -> dict`, one file each, listed in `suites.SUITES`; its table is JSON. It reaches a
model only through the audit, so that prompts which several suites ask cost one forward for each state.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import KifError
from .facts import BARE, BATCH, Fact, Progress, encode, first_token
from .outputs import Continuation, Outputs, Prompt, Reading, go_on, read
from .states import Running, State
from .text import window_losses

T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """What is to be erased: its name, other ways to call it, and what describes it without naming it."""

    name: str
    aliases: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a file, or of those in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [(file, file.stat()) for file in files if file.is_file()]
    return [(str(file), state.st_size, state.st_mtime_ns) for file, state in found]


@dataclass
class Audit:
    """What suites are given.

    before, after: the untouched and the erased model. reference: one that never knew, where there is one. All speak
    `tokenizer`. facts: about `subjects`; others: about other subjects; text: running text. data: where a suite that
    brings no data of its own finds it, by its name. form: how facts are asked. quick: less of everything (`pick`).
    seed: of every random choice (`generator`).
    """

    before: State
    after: State
    tokenizer: Any
    subjects: Sequence[Subject]
    facts: Sequence[Fact]
    others: Sequence[Fact] = ()
    text: str | None = None
    reference: State | None = None
    data: Mapping[str, Path] = field(default_factory=dict)
    form: str = BARE
    least_excess: float = 0.15
    quick: bool = False
    seed: int = 0
    batch_size: int = BATCH
    progress: Progress | None = None
    outputs: Outputs = field(default_factory=Outputs)
    _on: list[tuple[State, Running]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not self.facts:
            raise KifError("there are no facts to evaluate; give some about the erased subjects")

    @property
    def states(self) -> tuple[State, ...]:
        return (self.before, self.after, *((self.reference,) if self.reference else ()))

    @property
    def key(self) -> str:
        """64 hex digits for all that the tables of suites depend on."""
        from .. import __version__

        states = [(state.name, state.key, state.removable) for state in self.states]
        asked: list[Any] = [asdict(subject) for subject in self.subjects]
        asked += [asdict(fact) for fact in (*self.facts, *self.others)]
        data = sorted((name, str(path), _stamps(path)) for name, path in self.data.items())
        rest = (__version__, self.text, data, self.form, self.least_excess, self.quick, self.seed)
        return hashlib.sha256(json.dumps([states, asked, rest]).encode()).hexdigest()

    @contextmanager
    def running(self, state: State) -> Iterator[Running]:
        """`state` on. Inside itself it stays on and is given again; inside another state it is refused."""
        if self._on:
            if self._on[-1][0] is not state:
                raise RuntimeError(f"{self._on[-1][0].name} is on; leave it before {state.name} is entered")
            yield self._on[-1][1]
            return
        with state.enter() as given:
            running = given if isinstance(given, Running) else Running(given)
            self._on.append((state, running))
            try:
                yield running
            finally:
                self._on.pop()

    # -- asking, through the store

    def read(self, state: State, prompts: Sequence[Sequence[int]], what: str = "reading") -> list[Reading]:
        """A reading of each prompt of token ids: what follows it, and its last token's state after every block."""
        wanted = [tuple(prompt) for prompt in prompts]

        def make(indices: list[int]) -> list[Reading]:
            with self.running(state) as on:
                return self._in_parts(
                    indices, lambda some: read(on.model, [wanted[i] for i in some], batch_size=self.batch_size), what
                )

        return self.outputs.get([(*state.identity, prompt) for prompt in wanted], make)

    def go_on(
        self,
        state: State,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        watch: Sequence[Sequence[int]] | None = None,
        what: str = "answering",
    ) -> list[Continuation]:
        """The greedy continuation of each prompt of token ids; watch: per prompt, the tokens whose mass is noted."""
        wanted: list[Prompt] = [tuple(prompt) for prompt in prompts]
        seen = [tuple(ids) for ids in watch] if watch is not None else [()] * len(wanted)

        def make(indices: list[int]) -> list[Continuation]:
            def some_of(some: list[int]) -> list[Continuation]:
                asked, ids = [wanted[i] for i in some], [seen[i] for i in some]
                return go_on(on.model, self.tokenizer, asked, new_tokens, ids, batch_size=2 * self.batch_size)

            with self.running(state) as on:
                return self._in_parts(indices, some_of, what)

        keys = [(*state.identity, *pair, new_tokens) for pair in zip(wanted, seen, strict=True)]
        return self.outputs.get(keys, make)

    def once(self, state: State, what: Sequence[Any], make: Callable[[Running], T], prompts: Callable[[T], int]) -> T:
        """make(what is on) with `state` on, or what it gave before for the same state and `what`, a hashable sequence
        that says all that it depends on. prompts(value): how many prompts it asks."""

        def missing(_: list[int]) -> list[T]:
            with self.running(state) as on:
                return [make(on)]

        return self.outputs.get([(*state.identity, *what)], missing, prompts=prompts)[0]

    def losses(self, state: State, ids: Tensor) -> tuple[list[float], dict[str, int] | None]:
        """`text.window_losses` of ids [N, W], and how often each capsule fired on them where there is a gate."""

        def measured(on: Running) -> tuple[list[float], dict[str, int] | None]:
            if on.gate is not None:
                on.gate.reset()
            losses = window_losses(on.model, ids, progress=self.progress)
            return losses, None if on.gate is None else dict(on.gate.fired)

        digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        return self.once(state, ["losses", digest], measured, lambda found: len(found[0]))

    def probabilities(self, state: State, facts: Sequence[Fact], form: str | None = None) -> list[float]:
        """Per fact, the probability of the first token of " " + answer right after the prompt, as
        `facts.answer_probabilities` has it. form: the audit's, if left out."""
        form = form or self.form
        readings = self.read(state, encode(self.tokenizer, facts, form=form), f"{state.name}: answers ({form})")
        firsts = [first_token(self.tokenizer, fact.answer) for fact in facts]
        return [float(reading.log_probs[id].exp()) for reading, id in zip(readings, firsts, strict=True)]

    def priors(self, facts: Sequence[Fact], form: str | None = None) -> list[float]:
        """Per fact, how likely the untouched model finds its answer where the question is about others: measured where
        the fact lists others or their prompts, else what its file says, else 0."""
        found = iter(self.probabilities(self.before, [other for f in facts for other in f.asked_of_others()], form))
        each = [[next(found) for _ in fact.asked_of_others()] for fact in facts]
        return [
            sum(values) / len(values) if values else (fact.p_prior or 0.0)
            for fact, values in zip(facts, each, strict=True)
        ]

    def known(self, form: str | None = None) -> list[Fact]:
        """The facts that the untouched model knows: before − prior at least `least_excess`, asked directly."""
        before, priors = self.probabilities(self.before, self.facts, form), self.priors(self.facts, form)
        pairs = zip(self.facts, before, priors, strict=True)
        return [fact for fact, p, prior in pairs if p - prior >= self.least_excess]

    # -- how much, and at random

    def pick(self, quick: T, full: T) -> T:
        """`quick` in the quick profile, else `full`."""
        return quick if self.quick else full

    def generator(self, name: str) -> torch.Generator:
        """A seeded generator of its own for each name, so that no suite's choices hang on another's."""
        return torch.Generator().manual_seed(self._seed(name))

    def random(self, name: str) -> random.Random:
        """The same for Python's choices."""
        return random.Random(self._seed(name))

    def _seed(self, name: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:7], "big")

    def report(self, done: int, total: int, what: str) -> None:
        if self.progress is not None:
            self.progress(done, total, what)

    def _in_parts(self, indices: list[int], make: Callable[[list[int]], list[T]], what: str) -> list[T]:
        """make() over a few batches at a time, with a word on how far it is; alike work stays together."""
        made: list[T] = []
        step = 4 * self.batch_size
        for start in range(0, len(indices), step):
            made += make(indices[start : start + step])
            self.report(len(made), len(indices), what)
        return made
