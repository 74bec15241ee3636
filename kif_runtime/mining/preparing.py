"""The model's controls from their cache, or read and put there."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import MiningError
from ..files import reason, shown, sync_folder
from ..fingerprint import adapter_fingerprint, fingerprint
from ..models import cache_folder
from .background import Rows, strange_rows, text_rows, widened
from .control import (
    OPENING_SITE,
    RECIPE,
    Control,
    Level,
    Progress,
    default_site,
    early_site,
    read_control,
    shipped_neutral,
)
from .corpus import corpus
from .kinds import Kinds
from .neutral import References
from .reading import Reader, undisturbed


def prepare(
    model: nn.Module, tokenizer: Any, *, site: int | None = None, steps: int = 60, adapted: bool = False,
    passages: Sequence[str] = (), progress: Progress | None = None,
) -> Control:  # fmt: skip
    """The model's controls, from the cache or computed and put there. adapted: those of the model with its adapter.

    passages: text of your own, which joins the negatives; it is read anew in each process, and not kept on disk.
    The cache file is keyed by the model's fingerprint, the adapter's if it counts, the corpus, the site and the recipe.
    A damaged one is made anew. Raises MiningError for a model or tokenizer that cannot be read, KifError where the
    cache cannot be written.
    """
    reader = Reader(model, tokenizer)
    site = default_site(len(reader.blocks)) if site is None else site
    if not 0 <= site < len(reader.blocks):
        raise MiningError(f"site {site} is not a block of this model; choose 0 to {len(reader.blocks) - 1}")
    digest = fingerprint(model)
    path = _path(digest + adapter_fingerprint(model) if adapted else digest, site, steps)
    own = hashlib.sha256("\0".join(passages).encode()).hexdigest() if passages else ""
    if (path, own) in _loaded:
        return _loaded[path, own]
    tell = progress or (lambda done, total, what: None)
    with undisturbed(model, adapted):
        control = _loaded.get((path, "")) or _kept(path, reader, site, digest, steps, tell)
        _loaded.clear()  # one model at a time, and one text: the states take a hundred megabytes
        _loaded[path, ""] = control
        if passages:
            control = _loaded[path, own] = widened(control, reader, _own(tokenizer, passages), tell)
    return control


_loaded: dict[tuple[Path, str], Control] = {}


def _own(tokenizer: Any, passages: Sequence[str]) -> Rows:
    rows = text_rows(tokenizer, [p for p in passages if p.strip()])
    if not rows.ids:
        raise MiningError("the text of your own is empty; give some, or none")
    return rows


def _kept(path: Path, reader: Reader, site: int, digest: str, steps: int, tell: Progress) -> Control:
    """From the cache; where it is not there, or damaged, read from the model and put there."""
    control = _read(path, site, digest)
    if control is None:
        _check_writable(path)
        control = read_control(reader, site, digest, steps, tell)
        rows = strange_rows(reader.tokenizer, corpus().passages) + text_rows(reader.tokenizer, corpus().written)
        control = widened(control, reader, rows, tell)
        _write(path, control)
    shipped = shipped_neutral(digest, site)
    return control if shipped is None else replace(control, neutral=shipped)  # it may be newer than the cache


def _check_writable(path: Path) -> None:
    """Raise MiningError now, not after minutes of reading."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as failure:
        raise MiningError(f"cannot keep the model's controls in {shown(path.parent)}: {reason(failure)}") from failure


def _path(key: str, site: int, steps: int) -> Path:
    """key: the fingerprint, 64 digits, and after it the adapter's, if it counts."""
    model = "-".join(key[start : start + 24] for start in range(0, len(key), 64))
    return cache_folder() / "controls" / f"{model}-{corpus().digest[:12]}-site{site}-r{RECIPE}-{steps}.safetensors"


_TENSORS = ("states", "text", "last", "entity", "mean", "scatter", "raw_mean", "neutral")
_LEVEL = ("states", "text", "mean", "scatter", "usual")


def _write(path: Path, control: Control) -> None:
    tensors = {name: getattr(control, name) for name in _TENSORS}
    levels = {"opening": control.opening} | ({"early": control.early} if control.early else {})
    tensors |= {f"{level}.{name}": getattr(at, name) for level, at in levels.items() for name in _LEVEL}
    for kind, r in control.known.items():
        tensors |= {f"{kind}.tokens": r.tokens, f"{kind}.probs": r.probs, f"{kind}.answers": r.answers}
    tensors |= {"kinds.weights": control.kinds.weights, "kinds.bias": control.kinds.bias}
    known = {kind: {"templates": r.templates, "names": r.names} for kind, r in control.known.items()}
    kinds = {"site": control.kinds.site, "names": control.kinds.names}
    meta = {"texts": json.dumps(control.texts), "known": json.dumps(known), "kinds": json.dumps(kinds)}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".kif-", suffix=".tmp", dir=path.parent)
        os.close(handle)
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, meta)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as failure:
        told = reason(failure) if isinstance(failure, OSError) else str(failure)
        raise MiningError(f"cannot keep the model's controls in {shown(path.parent)}: {told}") from failure
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _read(path: Path, site: int, digest: str) -> Control | None:
    try:
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        known = {
            kind: References(
                tuple(k["templates"]),
                tuple(k["names"]),
                *(tensors[f"{kind}.{part}"] for part in ("tokens", "probs", "answers")),
            )
            for kind, k in json.loads(meta["known"]).items()
        }
        kinds = json.loads(meta["kinds"])
        main: dict[str, Any] = {name: tensors[name] for name in _TENSORS}
        main["opening"] = _read_level(tensors, "opening", OPENING_SITE)
        main["early"] = _read_level(tensors, "early", early_site(site)) if site > 0 else None
        main["kinds"] = Kinds(kinds["site"], tuple(kinds["names"]), tensors["kinds.weights"], tensors["kinds.bias"])
        return Control(site, digest, tuple(json.loads(meta["texts"])), known=known, entities=corpus().entities, **main)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None  # damaged: it is only a cache


def _read_level(tensors: dict[str, Tensor], level: str, site: int) -> Level:
    return Level(site, **{name: tensors[f"{level}.{name}"] for name in _LEVEL})
