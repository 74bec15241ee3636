"""Models and capsules as the commands need them: quietly, and checked against each other before long work."""

import os
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kif_runtime.errors import CapsuleError, KifError, RequestError

from .console import show_log, working

if TYPE_CHECKING:
    from kif_runtime import Capsule


def quiet() -> None:
    """Silence what the libraries under us print on their own account; their errors reach us as exceptions."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    show_log()


def open_model(name: str, *, adapter: Path | None = None, device: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer), with a word to whoever waits."""
    with working("loading the model"):
        quiet()
        _check_device(device)
        from kif_runtime import load_model

        return load_model(name, adapter=adapter, device=device)


def _check_device(device: str | None) -> None:
    if device is None:
        return
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError):  # torch has one for unknown names, one for each missing driver
        raise KifError(f"device {device!r} is not available here; use cpu, or leave --device out") from None


def load_capsules(files: Iterable[Path] | None) -> "list[Capsule]":
    """The capsules in `files`. Raises CapsuleError for a bad file, RequestError for two of one id."""
    from kif_runtime import Capsule

    found: dict[str, tuple[Path, Capsule]] = {}
    for file in files or ():
        capsule = Capsule.load(file)
        if capsule.id in found:
            raise RequestError(f"{found[capsule.id][0]} and {file} hold the same capsule id {capsule.id!r}; give one")
        found[capsule.id] = (file, capsule)
    return [capsule for _, capsule in found.values()]


def check_fit(capsules: "Iterable[Capsule]", files: Iterable[Path], model: Any) -> None:
    """Raise CapsuleError, naming the file, unless every capsule was made for `model`."""
    for capsule, file in zip(capsules, files, strict=True):
        try:
            capsule.check_model(model)
        except CapsuleError as problem:
            raise CapsuleError(f"{file}: {problem}") from None


def attached(model: Any, capsules: "list[Capsule]", max_false_fire: float | None = None) -> AbstractContextManager[Any]:
    """The capsules on the model; with none, a block that gives None and changes nothing."""
    if not capsules:
        return nullcontext()
    from kif_hf import attach

    return attach(model, capsules, max_false_fire=max_false_fire)
