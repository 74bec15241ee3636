"""kif retire: a capsule goes once the adapter does its work."""

import json as json_
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kif_runtime.errors import KifError
from kif_runtime.files import reason, shown, sync_folder

from .. import options
from ..console import out, print_json, progress

RETIRED = ".retired"


def retire(
    capsule: Annotated[Path, typer.Argument(metavar="CAPSULE", help="The capsule's file.")],
    model: options.Model,
    adapter: Annotated[Path, typer.Option(metavar="DIR", help="The adapter that was baked from it.")],
    name: Annotated[str | None, typer.Option(metavar="N", help="The subject's name, as for kif bake.")] = None,
    alias: Annotated[list[str] | None, typer.Option(metavar="A", help="Another name of the subject.")] = None,
    most_left: Annotated[
        float, typer.Option(metavar="F", help="Largest share of the answers' distance that may be left.")
    ] = 0.2,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the file instead of moving it aside.")] = False,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Put a capsule out of service if the adapter alone forgets its subject.

    Asked on held-out prompts, without the capsule. Passed, the file is renamed to CAPSULE.retired, or deleted; else it
    stays, and the exit code is 1.
    """
    from kif_runtime import Capsule

    found = Capsule.load(capsule)
    _check_provenance(found, adapter)
    from ..loading import open_model

    loaded, tokenizer = open_model(model, adapter=adapter, device=device)
    found.check_model(loaded)
    from kif_runtime.bake.retiring import left

    with progress() as report:
        report(0, 1, "asking the adapter")
        ratios = left(loaded, tokenizer, found, [name, *(alias or [])] if name else ())
    passed = ratios["forget"] <= most_left
    moved = _put_away(capsule, delete) if passed else None
    if json:
        where = None if moved is None else str(moved)
        print_json({"passed": passed, "ratios": ratios, "most_left": most_left, "deleted": passed and delete,
                    "moved_to": where})  # fmt: skip
    else:
        out().print(f"of the answers' distance to the capsule's, left by the adapter alone: {ratios['forget']:.3f}")
        done = "deleted" if delete else f"moved to {moved}"
        out().print(f"passed: {capsule} is {done}" if passed else f"over {most_left:g}: {capsule} stays in service")
    if not passed:
        raise typer.Exit(1)


def _check_provenance(capsule: Any, adapter: Path) -> None:
    """Raise KifError unless the adapter says that it was baked from this very capsule."""
    try:
        told = json_.loads((adapter / "kif.json").read_text())
        digests = [*told["capsules"], *told["earlier"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise KifError(f"{shown(adapter)} holds no kif.json of a baking; give what `kif bake` wrote") from None
    if capsule.digest not in digests:
        raise KifError(f"the adapter in {shown(adapter)} was not baked from this capsule; bake it first")


def _put_away(path: Path, delete: bool) -> Path | None:
    target = path.with_name(path.name + RETIRED)
    try:
        if delete:
            path.unlink()
        else:
            os.replace(path, target)
        sync_folder(path.parent)
    except OSError as failure:
        raise KifError(f"cannot put {shown(path)} away: {reason(failure)}") from None
    return None if delete else target
