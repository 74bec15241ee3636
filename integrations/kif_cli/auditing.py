"""From what `kif eval` was given to an audit: the states that are compared, the subjects, and the facts about each."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kif_runtime.errors import CapsuleError, KifError, ModelError, RequestError
from kif_runtime.files import reason, shown
from kif_runtime.ids import slug

if TYPE_CHECKING:
    from kif_runtime import Capsule
    from kif_runtime.evaluation.audit import Subject
    from kif_runtime.evaluation.facts import Fact
    from kif_runtime.evaluation.states import State

OWN_FACTS = Path(__file__).parent / "data" / "facts.jsonl"


@dataclass(frozen=True)
class Given:
    """What is asked about: facts about the subjects, facts about others, running text, and the subjects themselves."""

    facts: "list[Fact]"
    others: "list[Fact]"
    text: str | None
    subjects: "list[Subject]"


def read_given(capsules: "Sequence[Capsule]", facts: Path | None, neighbours: Path | None, text: Path | None) -> Given:
    """Raises KifError, naming file and line, for what cannot be read, and where no fact is about what is erased."""
    about, others = _split(capsules, facts, neighbours)
    return Given(about, others, None if text is None else _read(text), _subjects(about, capsules))


def _split(
    capsules: "Sequence[Capsule]", facts: Path | None, neighbours: Path | None
) -> "tuple[list[Fact], list[Fact]]":
    """Facts about what is erased, and about others. Public ids tell which is which."""
    from kif_runtime.evaluation.facts import load_facts

    found = load_facts(facts or OWN_FACTS)
    if neighbours is not None:
        return found, load_facts(neighbours)
    ids = {id for capsule in capsules for id in _ids(capsule)}
    about = [fact for fact in found if _id(fact.subject) in ids]
    if not about:
        where = f"no fact in {shown(facts)}" if facts else "no built-in fact"
        raise KifError(
            f"{where} is known to be about what is erased; give those facts with --facts FILE, others with --neighbours"
        )
    return about, [fact for fact in found if _id(fact.subject) not in ids]


def _ids(capsule: "Capsule") -> set[str]:
    return {capsule.id, *(slug(name) for name in (capsule.name, *capsule.aliases) if name)}


def _id(name: str) -> str | None:
    """The id that a public capsule of a subject called `name` has."""
    try:
        return slug(name)
    except CapsuleError:  # no letter in it
        return None


def _subjects(facts: "Sequence[Fact]", capsules: "Sequence[Capsule]") -> "list[Subject]":
    """The subjects of `facts`, with the aliases and descriptions that the file or a capsule of theirs has."""
    from kif_runtime.evaluation.audit import Subject

    subjects = []
    for name in dict.fromkeys(fact.subject for fact in facts):
        own = [fact for fact in facts if fact.subject == name]
        theirs = [capsule for capsule in capsules if _id(name) in _ids(capsule)]
        aliases = [alias for fact in own for alias in fact.aliases]
        aliases += [alias for c in theirs for alias in (c.name, *c.aliases) if alias and alias != name]
        descriptions = [text for fact in own for text in fact.descriptions]
        subjects.append(Subject(name, tuple(dict.fromkeys(aliases)), tuple(dict.fromkeys(descriptions))))
    return subjects


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise KifError(f"cannot read {shown(path)}: it is not UTF-8 text; convert it") from None
    except OSError as failure:
        raise KifError(f"cannot read {shown(path)}: {reason(failure)}") from None


def data_folders(given: Sequence[str] | None) -> dict[str, Path]:
    """SUITE=PATH pairs. Raises RequestError for what is none, and for a path that is not there."""
    found = {}
    for pair in given or ():
        name, sign, path = pair.partition("=")
        if not sign or not name or not path:
            raise RequestError(f"--data takes SUITE=PATH, as in tofu=data/tofu; got {shown(pair, 60)!r}")
        if not Path(path).exists():
            raise KifError(f"cannot read {shown(path)}: no such file or folder; check the path")
        found[name] = Path(path)
    return found


# -- the states


@dataclass(frozen=True)
class Compared:
    """What an erasure is judged by: the model, and what was done to it. Names of folders, and capsules."""

    model: str
    adapter: Path | None
    erased_model: str | None
    reference: str | None
    capsules: "Sequence[Capsule]"
    max_false_fire: float | None


@dataclass(frozen=True)
class States:
    both: "tuple[State, State]"
    reference: "State | None"
    tokenizer: Any


def states_of(compared: Compared, files: Sequence[Path] | None, device: str | None) -> States:
    """The states, with the models loaded. Raises KifError where a capsule, an adapter or a model does not fit."""
    from .loading import check_fit, open_model

    model, tokenizer = open_model(compared.model, adapter=compared.adapter, device=device)
    check_fit(compared.capsules, files or (), model)
    reference = other_model("reference", compared.reference, tokenizer, device) if compared.reference else None
    if compared.erased_model is not None:
        after = other_model("after", compared.erased_model, tokenizer, device)
    else:
        after = erased_state(model, compared.adapter, compared.capsules, compared.max_false_fire)
    return States((bare_state(model, compared.adapter), after), reference, tokenizer)


def bare_state(model: Any, adapter: Path | None) -> "State":
    """The untouched model: `model` without its adapter."""
    from kif_runtime.evaluation.states import State
    from kif_runtime.fingerprint import weights_digest

    @contextmanager
    def enter() -> Iterator[Any]:
        with _adapter(model, on=False, there=adapter is not None):
            yield model

    return State("before", enter, weights_digest(model))


def erased_state(
    model: Any, adapter: Path | None, capsules: "Sequence[Capsule]", max_false_fire: float | None
) -> "State":
    """`model` with its adapter on and the capsules attached."""
    from kif_runtime.evaluation.states import Running, State

    from .loading import attached

    @contextmanager
    def enter() -> Iterator[Any]:
        with (
            _adapter(model, on=True, there=adapter is not None),
            attached(model, list(capsules), max_false_fire) as gate,
        ):
            yield Running(model, gate)

    key = f"{[capsule.digest for capsule in capsules]} {max_false_fire} {adapter and folder_digest(adapter)}"
    ungated = erased_state(model, adapter, (), None) if capsules and adapter is not None else None
    return State("after", enter, key, bool(capsules), tuple(capsules), ungated)


def other_model(name: str, folder: str, tokenizer: Any, device: str | None) -> "State":
    """Another model as a state. Raises ModelError where it does not speak the same tokens."""
    from kif_runtime.evaluation.states import bare

    from .loading import open_model

    model, own = open_model(folder, device=device)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ModelError(f"{shown(folder)} has another vocabulary than the model; both must share their tokenizer")
    return bare(model, name)


@contextmanager
def _adapter(model: Any, *, on: bool, there: bool) -> Iterator[None]:
    """A PEFT model with its adapter on or off; left off."""
    if not there:
        yield
        return
    if on:
        model.base_model.enable_adapter_layers()
    else:
        model.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        model.base_model.disable_adapter_layers()


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the weights and configuration in an adapter's folder."""
    state = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".bin")):
        state.update(file.name.encode())
        with file.open("rb") as content:
            state.update(hashlib.file_digest(content, "sha256").digest())
    return state.hexdigest()
