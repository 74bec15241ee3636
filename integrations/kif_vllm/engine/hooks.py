"""What runs around vLLM's own functions in the engine core. Each takes the function that it stands around."""

from collections.abc import Callable
from typing import Any

from kif_runtime.errors import KifError

from ..config import KifConfig
from . import proof
from .service import Service

Inner = Callable[..., Any]


def set_up(inner: Inner, core: Any, vllm_config: Any) -> Any:
    """After the model is loaded, before anything runs through it. An error here ends the start of the server."""
    config = KifConfig.of(vllm_config)
    core.kif = None if config is None else Service(core, config)
    result = inner(core, vllm_config)  # ends with every worker's compile_or_warm_up_model
    if core.kif is not None:
        core.kif.serve()
    return result


def freeze(inner: Inner, core: Any, request: Any) -> Any:
    """Every request, in the input thread: its capsule set is settled before its blocks are hashed."""
    if core.kif is None:
        return inner(core, request)
    core.kif.freeze(request)
    try:
        result = inner(core, request)
    except BaseException:
        core.kif.ledger.release(request.request_id)
        raise
    core.kif.ledger.release_with(result[0])
    return result


def admit(inner: Inner, core: Any, request: Any, request_wave: int = 0) -> None:
    """A request enters the scheduler; one that a change has aborted on its way here does not."""
    if core.kif is not None and core.kif.ledger.is_doomed(request.request_id):
        core.kif.tell_aborted([request])
        return
    inner(core, request, request_wave)


def prove_then_run(inner: Inner, core: Any) -> Any:
    """Requests wait in the queue until the proof is done; where it fails, the engine dies and the server with it."""
    if core.kif is not None:
        proof.prove(core)
    return inner(core)


def prove_in_process(inner: Inner, client: Any, *args: Any, **kwargs: Any) -> None:
    inner(client, *args, **kwargs)
    if client.engine_core.kif is not None:
        proof.prove(client.engine_core)


COMMANDS = ("status", "load", "unload", "rescan", "evidence", "figures", "verify")


def call(core: Any, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """`EngineCore.kif_call`, the one method that KIF adds: a command from the front end, run between two steps.

    Gives {"result": …}, or {"error": one line, "kind": the error's class}.
    """
    if core.kif is None:
        return {"error": "this server runs without KIF"}
    if command not in COMMANDS:
        return {"error": f"unknown command {command!r}"}
    try:
        if command == "verify":
            return {"result": proof.prove(core)}
        return {"result": getattr(core.kif, command)(**arguments)}
    except KifError as problem:
        return {"error": str(problem), "kind": type(problem).__name__}
