"""What mining needs to know of a model, read once and cached: control states, reference answers, neutral direction."""

import json
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import MiningError
from ..files import reason, shown, sync_folder
from ..fingerprint import adapter_fingerprint, fingerprint
from ..models import cache_folder
from . import neutral as neutral_
from .corpus import ANY, Corpus, Entity, corpus, mentions
from .kinds import Kinds, learn_kinds
from .reading import Prompt, Reader, normalised, undisturbed
from .repeated import repeated

Progress = Callable[[int, int, str], None]
# Later blocks make the first token an attention sink with massive activations, in which a name can no longer be seen.
OPENING_SITE = 0
RECIPE = 7  # raise it when what is cached changes meaning

_TWICE = 4  # every so many entities are read in a text that names them twice, too

# The embedded model's neutral direction ships, since learning it well takes long; `bench/neutral.py` makes it anew.
SHIPPED = Path(__file__).parent / "data" / "neutral.safetensors"


@dataclass(frozen=True)
class Level:
    """Control states at one more site, of every second text.

    states [N, D] fp16: RMS-normalised. text [N]: which text each is of. mean [D], scatter [D, D]: of the states. usual
    [D]: the mean state, not normalised, of the tokens that are moved there.
    """

    site: int
    states: Tensor
    text: Tensor
    mean: Tensor
    scatter: Tensor
    usual: Tensor


@dataclass(frozen=True)
class Control:
    """One model's controls at one site.

    states [N, D] fp16: RMS-normalised states of every token of the control texts. text [N]: which text each is of.
    last [N]: it is the last token of its entity's name. entity [texts]: the number of that entity, or −1. mean [D],
    scatter [D, D]: of the states. raw_mean [D]: of last tokens, not normalised. neutral [D]. opening: OPENING_SITE, for
    first tokens. early: early_site, for later tokens of names; None where the site is 0. kinds: to tell a name's kind.
    known: reference answers by kind.
    """

    site: int
    fingerprint: str
    texts: tuple[str, ...]
    states: Tensor
    text: Tensor
    last: Tensor
    entity: Tensor
    mean: Tensor
    scatter: Tensor
    raw_mean: Tensor
    neutral: Tensor
    opening: Level
    early: Level | None
    kinds: Kinds
    known: dict[str, neutral_.References]
    entities: tuple[Entity, ...]

    def silent(self, text: Tensor, forms: Sequence[str]) -> Tensor:
        """Which rows of `text` are of a text that does not name the subject: those are its negatives."""
        return ~torch.tensor([mentions(t, forms) for t in self.texts])[text]


def default_site(blocks: int) -> int:
    """A tenth of the way up: the name's tokens have met, and what is known of them is not yet spread."""
    return max(1, round(0.1 * blocks))


def early_site(site: int) -> int:
    """Half way to the site: a token knows those before it, and nobody has yet read what is known of it."""
    return site // 2


def usual_sites(blocks: int) -> tuple[int, ...]:
    """Where the signatures of a capsule lie that was mined with the default site."""
    site = default_site(blocks)
    return tuple(sorted({OPENING_SITE, early_site(site), site}))


def prepare(
    model: nn.Module, tokenizer: Any, *, site: int | None = None, steps: int = 60, adapted: bool = False,
    progress: Progress | None = None,
) -> Control:  # fmt: skip
    """The model's controls, from the cache or computed and put there. adapted: those of the model with its adapter.

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
    if (found := _loaded.get(path)) is not None:
        return found
    control = _read(path, site, digest)
    shipped = shipped_neutral(digest, site)
    if control is not None and shipped is not None:
        control = replace(control, neutral=shipped)  # it may be newer than the cache
    if control is None:
        _check_writable(path)
        with undisturbed(model, adapted):
            control = _compute(reader, site, digest, steps, progress or (lambda done, total, what: None))
        _write(path, control)
    _loaded.clear()  # one model at a time: the states take a hundred megabytes
    _loaded[path] = control
    return control


_loaded: dict[Path, Control] = {}


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


def _compute(reader: Reader, site: int, digest: str, steps: int, progress: Progress) -> Control:
    data = corpus()
    rng = random.Random(0)
    prompts, about = _control_prompts(data, repeated(reader.tokenizer), rng)
    texts = tuple(p.text for p in prompts) + data.passages
    shipped = shipped_neutral(digest, site)
    total = len(texts) + len(data.entities) // 2 + 100 * len(data.kinds) + (0 if shipped is not None else 50 * steps)
    done = 0

    def advance(count: int, what: str) -> None:
        nonlocal done
        done += count
        progress(done, total, what)

    raw = reader.states(texts, site, tick=lambda n: advance(n, "reading controls"))
    spans = reader.name_tokens(prompts)
    last = torch.cat([_marked(len(x), spans[i][-1] if i < len(spans) else None) for i, x in enumerate(raw)])
    text = torch.cat([torch.full((len(x),), i) for i, x in enumerate(raw)])
    stacked = torch.cat(raw)
    states = normalised(stacked)
    mean = states.mean(0)
    kinds = learn_kinds(reader, data, tick=lambda n: advance(n, "telling kinds apart"))
    known = {}
    for kind in data.kinds:
        known[kind] = neutral_.references(reader, data, kind, rng)
        advance(100, "reading reference answers")
    lead = reader.leading_tokens
    opening = _level(reader, texts, OPENING_SITE, [[(i, lead)] for i in range(len(prompts))])
    later = [[(i, q) for q in span[1:]] for i, span in enumerate(spans)]
    early = _level(reader, texts, early_site(site), later) if site > 0 else None
    raw_last = stacked[last]
    vector = shipped
    if vector is None:
        vector = neutral_.learn(
            reader, data, known, site, scale=float(raw_last.norm(dim=1).median()), steps=steps,
            tick=lambda n: advance(50 * n, "learning the neutral direction"),
        )  # fmt: skip
    return Control(
        site, digest, texts, states.half(), text, last, torch.tensor([*about, *([-1] * len(data.passages))]),
        mean, (states - mean).T @ (states - mean) / len(states), raw_last.mean(0), vector,
        opening, early, kinds, known, data.entities,
    )  # fmt: skip


def _level(reader: Reader, texts: Sequence[str], site: int, wanted: Sequence[Sequence[tuple[int, int]]]) -> Level:
    """Every second text at `site`; `usual` is the mean over the `wanted` (text, position) of these texts."""
    chosen = range(0, len(texts), 2)
    rows = dict(zip(chosen, reader.states([texts[i] for i in chosen], site), strict=True))
    states = normalised(torch.cat(list(rows.values())))
    text = torch.cat([torch.full((len(x),), i) for i, x in rows.items()])
    usual = torch.stack([rows[i][q] for places in wanted for i, q in places if i in rows]).mean(0)
    away = states - states.mean(0)
    return Level(site, states.half(), text, states.mean(0), away.T @ away / len(states), usual)


def _control_prompts(data: Corpus, twice: Sequence[str], rng: random.Random) -> tuple[list[Prompt], list[int]]:
    """About every entity a template for anything and one for its kind; about some, a text that names it twice."""
    prompts, about = [], []
    for number, entity in enumerate(data.entities):
        for templates in (data.templates[ANY], data.templates[entity.kind]):
            prompts.append(Prompt.of(rng.choice(templates), entity.name))
            about.append(number)
        if number % _TWICE == 0:
            prompts.append(Prompt.of(twice[number // _TWICE % len(twice)], entity.name, mention=1))
            about.append(number)
    return prompts, about


def _marked(length: int, position: int | None) -> Tensor:
    row = torch.zeros(length, dtype=torch.bool)
    if position is not None:
        row[position] = True
    return row


def shipped_neutral(digest: str, site: int) -> Tensor | None:
    """The neutral direction [D] that ships for the model with this fingerprint, or None."""
    if not SHIPPED.exists():
        return None
    with safe_open(SHIPPED, "pt") as file:
        name = f"{digest}.{site}"
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 - not a mapping


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
            kind: neutral_.References(
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
