"""kif serve and kif verify: a vLLM server that suppresses, and the proof that one does."""

import http.client
import json as codec
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer

from kif_runtime.errors import KifError, one_line
from kif_vllm.config import ADMIN_KEY

from .. import options
from ..console import err, out, print_json


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="M", help="A folder, a hub id, or 'embedded'.")],
    capsules: Annotated[
        Path, typer.Option("--capsules", metavar="DIR", help="The directory of capsules to serve with.")
    ],
) -> None:
    """Serve a model with vLLM, with subjects suppressed.

    Capsules are checked against the model first. What comes after `--` goes to `vllm serve`. With KIF_ADMIN_KEY set
    in the environment, capsules can be loaded and taken out while it runs.
    """
    from kif_vllm.serve import prepare, run

    launch = prepare(model, capsules, list(context.args), dict(os.environ))
    err().print(f"starting: {' '.join(launch.command[:3])}", style="dim")
    run(launch)


def verify(
    url: Annotated[str, typer.Option(metavar="URL", help="Where the server listens.")] = "http://127.0.0.1:8000",
    json: options.Json = False,
) -> None:
    """Have a running server prove that suppression is live.

    A request goes through its engine, and every site on every rank is compared with the operator's reference. Needs
    the server's KIF_ADMIN_KEY in the environment. Exit code 1 where the proof fails.
    """
    key = os.environ.get(ADMIN_KEY)
    if not key:
        raise KifError(f"{ADMIN_KEY} is not set; set it to the key that the server was started with")
    status, answer = _post(f"{url.rstrip('/')}/kif/verify", key)
    if status not in (200, 500):
        raise KifError(f"the server answered {status}: {_detail(answer)}")
    proven = status == 200
    if json:
        print_json({"proven": proven, "url": url} | (answer if proven else {"error": _detail(answer)}))
    elif proven:
        out().print(f"suppression is live: sites {', '.join(answer['sites'])} on {answer['ranks']} rank(s)")
    else:
        err().print(f"kif: not proven: {_detail(answer)}")
    if not proven:
        raise typer.Exit(1)


def _post(url: str, key: str) -> tuple[int, dict[str, Any]]:
    if not url.startswith(("http://", "https://")):
        raise KifError(f"{url!r} is no http address; write it as http://HOST:PORT")
    request = urllib.request.Request(url, data=b"", method="POST", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, codec.load(answer)
    except urllib.error.HTTPError as refusal:
        try:
            return refusal.code, codec.load(refusal)
        except ValueError:
            return refusal.code, {}
    except (OSError, ValueError, http.client.HTTPException) as problem:
        raise KifError(f"no answer from {url} ({problem}); is it the server's address, and the server up?") from None


def _detail(answer: dict[str, Any]) -> str:
    error = answer.get("error", {})
    return one_line(
        answer.get("detail") or (error.get("message") if isinstance(error, dict) else error) or "no reason given"
    )
