"""`bake`: from capsules to a PEFT adapter."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..blocks import decoder_blocks, unwrapped
from ..capsule import Capsule
from ..errors import BakingError
from ..files import shown
from ..fingerprint import fingerprint
from . import adapter as adapters
from . import output, validation
from .completions import completed
from .continuing import Earlier, added, compact, joined
from .data import Data, Subject, gathered
from .durability import pressures
from .homes import Homes, homes, last_home, taken
from .naming import forms_of
from .objectives import DEFAULT, Objective, Setup, objective
from .order import seeded
from .passes import Passes
from .processes import Processes
from .settings import Settings
from .trainer import Outcome, Progress, Trainer


@dataclass(frozen=True)
class Baked:
    """What was written. folder: where. ratios: `validation.answers` of the adapter alone. provenance: `kif.json`."""

    folder: Path
    ratios: dict[str, float]
    seconds: float
    nbytes: int
    provenance: dict[str, Any]


def bake(
    model: Any, tokenizer: Any, capsules: Sequence[Capsule], out: str | os.PathLike[str], *,
    names: Mapping[str, Sequence[str]] | None = None, examples: Sequence[dict[str, str]] = (),
    objective: str | Objective = DEFAULT, options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None, durability: Sequence[str] = (), seed: int = 0,
    continue_from: str | os.PathLike[str] | None = None, merge: bool = False, accelerator: Any = None,
    progress: Progress | None = None,
) -> Baked:  # fmt: skip
    """Train a LoRA that forgets what `capsules` suppress, and write it to the folder `out`.

    names: capsule id → the subject's name and aliases, for capsules that store none. examples: rows of `own_examples`.
    objective: by name, with `options`, or made. settings: fields of `Settings` to change. durability: names in
    `durability.PRESSURES`; with any, every step is taken and the last adapter kept, as validation in peace would choose
    one that no attack has touched. continue_from: an earlier adapter, which stays part of the new one. merge: also
    write the whole model with the adapter in its weights, to `out`/merged. accelerator: accelerate's, when several
    processes train together.

    `model` is left as it was. Called again with the same arguments after it was killed, it goes on where it stopped
    and ends with the same adapter. Raises BakingError for what cannot be baked, CapsuleError for a capsule of another
    model.
    """
    begun = time.perf_counter()
    _check_installed()
    folder, processes = Path(out), Processes(accelerator)
    chosen = _objective(objective, options)
    chosen.neurons = None  # an object may have served an earlier baking
    _check_ids(capsules, names or {})
    digest = fingerprint(model)
    for capsule in capsules:
        capsule.check_model(digest)
    forms = [forms_of(model, tokenizer, capsule, (names or {}).get(capsule.id, ())) for capsule in capsules]
    subjects = [Subject(capsule, own) for capsule, own in zip(capsules, forms, strict=True)]
    if processes.is_main:
        output.check_folder(folder)
    processes.wait()
    earlier = _earlier(continue_from) if continue_from is not None else None
    gone = taken(model, earlier.change) if earlier is not None else {}
    places = homes(Counter(s.site for c in capsules for s in c.signatures), len(decoder_blocks(model)), gone)
    wanted = _settings(chosen, places, len(decoder_blocks(model)), settings or {})
    run = _run(digest, subjects, examples, chosen, wanted, durability, seed, earlier and earlier.digest)
    with ExitStack() as stack:
        if earlier is not None:
            stack.enter_context(added(unwrapped(model), earlier.factors))
        wrapped = stack.enter_context(adapters.adapted(model, wanted, seed))
        passes = Passes(wrapped, capsules)
        data = gathered(tokenizer, subjects, examples, seed)
        if chosen.completions:
            data.forget = completed(passes, tokenizer, data.forget, chosen.alternatives, seed)
        validate = None if durability else _validation(chosen, passes, data, last_home(places))
        trainer = Trainer(
            passes, chosen, data.forget, data.retain, wanted, adapters.parameters(wrapped), folder, run, seed,
            processes, validate, pressures(durability, passes), progress,
        )  # fmt: skip
        chosen.prepare(_setup(passes, tokenizer, data, wanted, seed, places, gone))
        wanted = trainer.settings = _settings(chosen, places, len(decoder_blocks(model)), settings or {})
        outcome = trainer.train()
        ratios = validation.answers(passes, data.held_forget, data.held_retain)
        factors = _factors(wrapped)
    factors = compact(factors if earlier is None else joined(earlier.factors, factors))
    provenance = _provenance(capsules, digest, chosen, wanted, durability, seed, earlier, outcome, ratios, factors)
    nbytes = 0
    if processes.is_main:
        nbytes = _write(folder, factors, model, tokenizer, provenance, merge, chosen.token_rows())
    processes.wait()
    return Baked(folder, ratios, time.perf_counter() - begun, nbytes, provenance)


def _earlier(folder: str | os.PathLike[str]) -> Earlier:
    found = Earlier(folder)
    if found.rows:
        raise BakingError(f"the adapter in {shown(folder)} has a token of its own, which a later one cannot keep")
    return found


def _check_installed() -> None:
    if missing := [name for name in ("peft", "accelerate") if importlib.util.find_spec(name) is None]:
        raise BakingError(f"baking needs {' and '.join(missing)}; install with: pip install 'kif-runtime[bake]'")


def _objective(given: str | Objective, options: Mapping[str, Any] | None) -> Objective:
    return given if isinstance(given, Objective) else objective(given, **(options or {}))


def _check_ids(capsules: Sequence[Capsule], names: Mapping[str, Sequence[str]]) -> None:
    if not capsules:
        raise BakingError("there is nothing to forget; give a capsule")
    ids = [c.id for c in capsules]
    if unknown := [id for id in names if id not in ids]:
        raise BakingError(f"a name is given for {unknown[0]!r}, which is none of the capsules; check the id")
    if len(set(ids)) < len(ids):
        raise BakingError("two capsules have the same id; give each subject once")


def _settings(chosen: Objective, places: Homes, blocks: int, changes: Mapping[str, Any]) -> Settings:
    """The objective's, with the user's changes; blocks and rank not chosen by the user hold all signatures."""
    proposed = chosen.settings(max(places), blocks)
    fewest = max(Counter(home for own in places.values() for home in own).values())
    if chosen.name == DEFAULT:
        reached = last_home(places) + 1
        proposed = dataclasses.replace(proposed, blocks=max(reached, proposed.blocks or blocks))
    if chosen.name == DEFAULT and "rank" not in changes:
        rank = max(proposed.rank, fewest)
        proposed = dataclasses.replace(proposed, rank=rank, alpha=2.0 * rank)
    known = {f.name for f in dataclasses.fields(Settings)}
    if unknown := [name for name in changes if name not in known]:
        raise BakingError(f"there is no setting {unknown[0]!r}; there are {', '.join(sorted(known))}")
    made = dataclasses.replace(proposed, **changes)
    if chosen.closed_form:
        made = dataclasses.replace(made, steps=0)
    if made.rank < 1 or made.steps < 0 or made.forget_rows < 1 or made.retain_rows < 1 or made.learning_rate <= 0:
        raise BakingError("rank, rows and learning rate have to be over 0, and steps 0 or more; correct the settings")
    if chosen.writes_neurons and made.rank < fewest:
        raise BakingError(
            f"rank {made.rank} is too low for the {fewest} signatures that one block takes; leave it out, or bake "
            "fewer capsules at once"
        )
    return made


def _run(*parts: Any) -> str:
    """What tells this baking from another, so that a checkpoint is not taken for another's."""
    digest, subjects, examples, chosen, settings, durability, seed, earlier = parts
    told = {
        "kif": __version__, "model": digest, "capsules": [s.capsule.digest for s in subjects],
        "forms": [s.forms for s in subjects], "examples": list(examples), "objective": chosen.name,
        "options": chosen.report(), "settings": dataclasses.asdict(settings), "durability": list(durability),
        "seed": seed, "earlier": earlier,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _setup(
    passes: Passes, tokenizer: Any, data: Data, settings: Settings, seed: int, places: Homes, gone: dict[int, Tensor]
) -> Setup:
    model = passes.model
    return Setup(
        passes, tokenizer, data.forget, data.retain, settings, seeded(seed, "prepare"), adapters.parameters(model),
        adapters.layers(model), places, gone,
    )  # fmt: skip


def _validation(chosen: Objective, passes: Passes, data: Data, block: int) -> Any:
    if chosen.validated_at is None:
        return None
    if chosen.validated_at == "states":
        return lambda: validation.states(passes, data.held_forget, data.held_retain, block)
    return lambda: validation.answers(passes, data.held_forget, data.held_retain)


def _factors(wrapped: Any) -> output.Factors:
    """The trained LoRA by module path of the plain model, its scale in A."""
    found = {}
    for path, layer in adapters.layers(wrapped).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scaled = a.detach().float().cpu() * layer.scaling["default"]
        found[path.removeprefix("base_model.model.")] = (scaled, b.detach().float().cpu().clone())
    return found


def _provenance(
    capsules: Sequence[Capsule], digest: str, chosen: Objective, settings: Settings, durability: Sequence[str],
    seed: int, earlier: Earlier | None, outcome: Outcome, ratios: Mapping[str, float], factors: output.Factors,
) -> dict[str, Any]:  # fmt: skip
    import accelerate
    import peft
    import transformers

    return {
        "schema": 1,
        "kif": __version__,
        "versions": {
            "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
            "accelerate": accelerate.__version__,
        },
        "model": digest,
        "capsules": [c.digest for c in capsules],
        "earlier": earlier.capsules if earlier is not None else [],
        "objective": chosen.name,
        "options": chosen.report(),
        "neurons": chosen.neurons,
        "settings": dataclasses.asdict(settings),
        "durability": list(durability),
        "seed": seed,
        "steps": outcome.steps,
        "best_step": outcome.best_step,
        "stopped": outcome.stopped,
        "ratios": dict(ratios),
        "rank": next(iter(factors.values()))[0].shape[0],
        "blocks": len({tuple(p for p in m.split(".") if p.isdigit()) for m in factors}),
    }  # fmt: skip


def _write(
    folder: Path, factors: output.Factors, model: Any, tokenizer: Any, provenance: dict[str, Any], merge: bool,
    rows: Mapping[int, Tensor],
) -> int:  # fmt: skip
    targets = sorted({module.split(".")[-1] for module in factors})
    base = str(getattr(unwrapped(model).config, "_name_or_path", "") or "")
    plain = unwrapped(model)
    embeddings = next(path for path, module in plain.named_modules() if module is plain.get_input_embeddings())
    nbytes = output.write_adapter(folder, factors, targets, base=base, rows=rows, embeddings=embeddings)
    output.write_card(folder, provenance)
    output.forget_merged(folder)  # of an unfinished run that was to merge
    if merge:
        output.write_merged(folder / output.MERGED, factors, plain, tokenizer, rows)
    output.write_json(folder / output.PROVENANCE, provenance)  # last: it says that the folder is complete
    output.finish(folder)
    return nbytes
