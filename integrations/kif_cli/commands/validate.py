"""kif validate: whether capsule files are sound, and made for a model."""

from pathlib import Path
from typing import Annotated

import typer

from kif_runtime.errors import CapsuleError

from .. import options
from ..console import err, out, print_json


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Capsule files.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="M", help="Also check that they are made for it.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Check capsule files, and that a model fits.

    Schema, tensors, orthonormal bases and, with --model, the fingerprint. Every bad file is named; exit code 2 if any.
    """
    from kif_runtime import Capsule

    fingerprint = None
    if model is not None:
        from kif_runtime.fingerprint import fingerprint as take

        from ..loading import open_model

        loaded, _ = open_model(model)
        fingerprint = take(loaded)
    results = []
    for file in files:
        try:
            capsule = Capsule.load(file, fingerprint)
            results.append({"file": str(file), "valid": True, "id": capsule.id, "error": None})
        except CapsuleError as problem:
            results.append({"file": str(file), "valid": False, "id": None, "error": str(problem)})
    valid = all(result["valid"] for result in results)
    if json:
        print_json({"valid": valid, "model": model, "files": results})
    else:
        for result in results:
            if result["valid"]:
                out().print(f"ok  {result['file']}  {result['id']}")
            else:
                err().print(f"kif: {result['error']}")
    if not valid:
        raise typer.Exit(2)
