"""What the engine core calls in every worker, as the first argument of `collective_rpc`. `worker` is vLLM's."""

import hashlib
from typing import Any

from kif_runtime.errors import KifError

from . import runner_v1, runner_v2
from .site import Site, put_compiled, put_exact
from .sites import module_of, place_of
from .suppression import Change, Room, Suppression

_NAME = "kif.site."


def describe(worker: Any) -> dict[str, Any]:
    """What the engine core needs to know of the model before anything is set up."""
    runner = _runner(worker)
    place_of(runner.get_model())
    return {"max_tokens": runner.max_num_tokens}


def install(worker: Any, room: Room, stamp: dict[str, Any]) -> list[int]:
    """Put the sites into the loaded model, before its first forward. Gives the blocks whose sites this rank has.

    stamp: what compiled graphs depend on; it becomes part of vLLM's compile-cache key.
    """
    runner, worker = _runner(worker), _inner(worker)
    config, model = worker.vllm_config, runner.get_model()
    config.additional_config["kif_stamp"] = stamp
    suppression = runner.kif = Suppression(room, runner.device)
    suppression.warming = True
    compiled = bool(config.compilation_config.mode)
    place = place_of(model)
    for block in room.sites:
        module = module_of(model, place, block, room.blocks)
        if module is None:
            continue
        site = suppression.sites[block] = Site(block, suppression.bank.site(block), suppression.batch)
        if compiled:
            config.compilation_config.static_forward_context[f"{_NAME}{block}"] = site
            put_compiled(module, f"{_NAME}{block}", norm=place.norm is not None)
        else:
            put_exact(module, site, norm=place.norm is not None)
    (runner_v2 if config.use_v2_model_runner else runner_v1).attach(runner, suppression)
    return sorted(suppression.sites)


def serve(worker: Any) -> None:
    """vLLM's warm-up is over: from here on a request without a frozen set stops the step."""
    _runner(worker).kif.warming = False


def apply(worker: Any, change: Change) -> dict[str, str]:
    """Gives {"held": a digest of the versions held after it}, or {"error": …}; the same on every rank."""
    suppression = _runner(worker).kif
    try:
        suppression.apply(change)
    except KifError as problem:
        return {"error": str(problem)}
    return {"held": hashlib.sha256("\n".join(sorted(suppression.bank.capsules)).encode()).hexdigest()}


def evidence(worker: Any, request: str) -> dict[str, int] | None:
    return _runner(worker).kif.evidence(request)


def figures(worker: Any) -> dict[str, Any]:
    return _runner(worker).kif.figures()


def _inner(worker: Any) -> Any:
    """The worker inside vLLM's wrapper, if there is one."""
    return getattr(worker, "worker", worker)


def _runner(worker: Any) -> Any:
    return _inner(worker).model_runner
