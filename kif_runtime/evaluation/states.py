"""The models that an audit compares, each as something to enter: it is put on, asked, and taken off again."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..fingerprint import weights_digest


class Running(NamedTuple):
    """A state that is on. gate: what counts where the erasure fired (`fired`, `fired_rows`, `reset`), if anything."""

    model: Any
    gate: Any = None


@dataclass(frozen=True)
class State:
    """One of the models compared. enter() puts it on and takes it off again; it gives the model, or a `Running`.

    key: what tells its outputs from another state's, in memory and on disk; states of one key are one model. removable:
    whoever holds the weights can take the erasure off, as with a gate. capsules: those that are attached, for what
    wants their directions. ungated: what is left where the gate is taken off, if that is not the untouched model.
    """

    name: str
    enter: Callable[[], AbstractContextManager[Any]]
    key: str = ""
    removable: bool = False
    capsules: tuple[Any, ...] = ()
    ungated: "State | None" = None

    @property
    def identity(self) -> tuple[str, ...]:
        """Whose outputs these are; by name where there is no key."""
        return (self.key,) if self.key else ("", self.name)


def bare(model: Any, name: str = "before") -> State:
    """The state of `model` as it stands; its key is the digest of its weights."""

    @contextmanager
    def enter() -> Iterator[Any]:
        yield model

    return State(name, enter, weights_digest(model))
