"""kif validate: whether capsule files are sound, made for a model, and hold under an adapter."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kif_runtime.errors import CapsuleError, KifError

from .. import options
from ..console import err, out, print_json, working

if TYPE_CHECKING:
    from kif_runtime import Capsule


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Capsule files.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="M", help="Also check that they are made for it.")
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also measure whether their thresholds hold with this PEFT adapter on it."),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="With --adapter: a form of the subject's name, if the capsule holds none."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Check capsule files, and that a model fits.

    Schema, tensors, orthonormal bases and, with --model, the fingerprint. Every bad file is named; exit code 2 if any.
    With --adapter: how often the subject is recognised, and other text taken for it, with the adapter and without;
    exit code 1 where the thresholds do not hold, and then `kif mine --adapter` finds others.
    """
    from kif_runtime import Capsule

    if adapter is not None and model is None:
        raise KifError("--adapter goes on a model; name it with --model")
    if name and (adapter is None or len(files) > 1):
        raise KifError("--name is for one capsule and --adapter; leave it out, or check the files one by one")
    fingerprint = loaded = tokenizer = None
    if model is not None:
        from kif_runtime.fingerprint import fingerprint as take

        from ..loading import open_model

        loaded, tokenizer = open_model(model, adapter=adapter)
        fingerprint = take(loaded)
    results: list[dict[str, Any]] = []
    for file in files:
        try:
            capsule = Capsule.load(file, fingerprint)
            results.append({"file": str(file), "valid": True, "id": capsule.id, "error": None})
            if adapter is not None:
                with working(f"measuring {file}"):
                    results[-1] |= _under_adapter(loaded, tokenizer, capsule, name or ())
        except CapsuleError as problem:
            results.append({"file": str(file), "valid": False, "id": None, "error": str(problem)})
    valid = all(result["valid"] for result in results)
    if json:
        print_json({"valid": valid, "model": model, "files": results})
    else:
        for result in results:
            _print(result)
    if not valid:
        raise typer.Exit(2)
    if not all(result.get("holds", True) for result in results):
        raise typer.Exit(1)


def _under_adapter(model: Any, tokenizer: Any, capsule: "Capsule", names: Sequence[str]) -> dict[str, Any]:
    """holds, and the rates without the adapter and with it."""
    from kif_runtime.evaluation.thresholds import rates

    found = {}
    for when, state in (("without", model.disable_adapter()), ("with", nullcontext())):
        with state:
            found[when] = rates(model, tokenizer, capsule, names)
    return {"holds": found["with"].hold_against(found["without"])} | {k: v._asdict() for k, v in found.items()}


def _print(result: dict[str, Any]) -> None:
    if not result["valid"]:
        err().print(f"kif: {result['error']}")
        return
    out().print(f"ok  {result['file']}  {result['id']}")
    if "holds" not in result:
        return
    for when in ("without", "with"):
        rates = result[when]
        named = f"{rates['recall']:.1%} of {rates['prompts']} names recognised" if rates["prompts"] else "no name known"
        out().print(f"    {when} the adapter: {named}, {rates['false_fires']:.1e} of {rates['tokens']} other tokens")
    if not result["holds"]:
        out().print("    its thresholds do not hold under the adapter: kif mine NAME --adapter DIR finds others")
