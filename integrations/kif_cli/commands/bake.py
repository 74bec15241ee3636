"""kif bake: from capsules to a standard PEFT LoRA adapter."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kif_runtime.errors import KifError
from kif_runtime.files import shown

from .. import options, outputs
from ..console import err, out, print_json, progress

if TYPE_CHECKING:
    from kif_runtime import Capsule
    from kif_runtime.bake import Baked


def bake(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the adapter goes: a new folder.")
    ],
    capsule: options.Capsules = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N",
            help="The subject's name, one for each capsule, in order. Else the one stored "
            "in it, or the one its id spells, if the capsule recognises that.",
        ),
    ] = None,
    alias: Annotated[list[str] | None, typer.Option(metavar="A", help="Another name of the one subject.")] = None,
    requests: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The names of many: the file that `kif mine --batch` took.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Own examples, JSON lines: prompt, completion, split.")
    ] = None,
    objective: Annotated[str, typer.Option(metavar="O", help="How to forget.")] = "capsule",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the objective; give it again for more.")
    ] = None,
    durability: Annotated[
        list[str] | None, typer.Option(metavar="D", help="Train under attack: relearn, latent or 4bit.")
    ] = None,
    rank: Annotated[int | None, typer.Option(metavar="R", help="Rank of the LoRA.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="At most so many steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(metavar="F", help="Of AdamW.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=options.LARGEST_SEED, metavar="N", help="Everything random follows from it.")
    ] = 0,
    continue_from: Annotated[
        Path | None, typer.Option(metavar="DIR", help="An earlier adapter: its subjects stay forgotten.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Also write the whole model, to DIR/merged.")] = False,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Make what capsules suppress permanent: a standard PEFT LoRA adapter.

    Neither KIF nor the capsules are needed to use it. Interrupted, the same command goes on where it stopped. Several
    processes share the work under `accelerate launch -m kif_cli.main bake …`.
    """
    if not capsule:
        raise KifError("there is nothing to bake; give a capsule with --capsule FILE")
    outputs.check_folder(output)
    from ..loading import check_fit, load_capsules, open_model

    capsules = load_capsules(capsule)
    names = _names(capsules, name or [], alias or [], requests)
    from kif_runtime.bake import bake as make
    from kif_runtime.bake import own_examples
    from kif_runtime.bake.objectives import objective as chosen

    made = chosen(objective, **dict(_option(text) for text in option or ()))
    examples = own_examples(data) if data is not None else []
    settings = {"rank": rank, "steps": steps, "learning_rate": learning_rate}
    settings = {k: v for k, v in settings.items() if v is not None}
    if rank is not None:
        settings["alpha"] = 2.0 * rank
    loaded, tokenizer = open_model(model, device=device)
    check_fit(capsules, capsule, loaded)
    try:
        with progress() as report:
            result = make(
                loaded, tokenizer, capsules, output, names=names, examples=examples, objective=made, settings=settings,
                durability=durability or (), seed=seed, continue_from=continue_from, merge=merge,
                accelerator=_accelerator(), progress=report,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise KifError("interrupted; run the same command to go on from the last checkpoint") from None
    if int(os.environ.get("RANK", "0")) == 0:
        _print(result, json)


def _names(
    capsules: "Sequence[Capsule]", names: Sequence[str], aliases: Sequence[str], requests: Path | None
) -> dict[str, list[str]]:
    """Capsule id → name and aliases, as far as they are given."""
    if names and requests is not None:
        raise KifError("give names with --name or with --requests, not both")
    if names and len(names) != len(capsules):
        raise KifError(f"{len(capsules)} capsules and {len(names)} names; give --name once for each, in the same order")
    if aliases and len(names) != 1:
        raise KifError("--alias is for one subject with --name; for many, put aliases into the lines of --requests")
    if requests is not None:
        told = _requests(requests)
        return {c.id: told[c.id] for c in capsules if c.id in told}
    return {c.id: [given, *aliases] for c, given in zip(capsules, names, strict=False)}


def _requests(path: Path) -> dict[str, list[str]]:
    """The names in a file of mining requests, by the id that each one's capsule has."""
    import json

    from kif_runtime.mining.api import checked_id

    found = {}
    for number, line in enumerate(outputs.read_lines(path, "requests"), 1):
        try:
            row = json.loads(line)
            id = checked_id(row.get("id"), row["name"], False)
            found[id] = [row["name"], *(row.get("aliases") or ())]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise KifError(f'{shown(path)}, request {number}: not an object with a "name"; correct it') from None
    return found


def _option(text: str) -> tuple[str, Any]:
    """NAME=VALUE with a JSON value."""
    import json

    name, _, value = text.partition("=")
    try:
        return name.replace("-", "_"), json.loads(value)
    except ValueError:
        raise KifError(f"--option {text!r} is not NAME=VALUE with a number, true or false; write retain=2.0") from None


def _accelerator() -> Any:
    """Accelerate's, where several processes were launched together."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"))


def _print(result: "Baked", json: bool) -> None:
    told: Mapping[str, Any] = result.provenance
    if json:
        print_json({
            "folder": str(result.folder), "seconds": round(result.seconds, 3), "bytes": result.nbytes,
            "ratios": result.ratios, "provenance": dict(told),
        })  # fmt: skip
        return
    many = len(told["capsules"])
    out().print(
        f"{many} subject{'s' if many > 1 else ''} baked in {result.seconds:.1f} s: rank {told['rank']}, "
        f"{told['blocks']} blocks, {result.nbytes / 1e6:.1f} MB, {told['steps']} training steps"
    )
    out().print(f"  of the answers' distance to the capsules' on held-out prompts, left: {result.ratios['forget']:.3f}")
    out().print(f"  moved about others, in the same unit: {result.ratios['retain']:.4f}")
    out().print(f"written to {result.folder}")
    if told["neurons"] == 0:
        err().print("kif: warning: signatures could not be written as neurons of this model, so all of it was trained")
    if result.ratios["forget"] > 0.3:
        err().print("kif: warning: much of what the capsules hide is left; try more --steps, or a larger --rank")
