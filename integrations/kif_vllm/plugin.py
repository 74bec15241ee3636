"""The entry points that vLLM calls. Kept free of imports: vLLM logs an import error here and then serves without us."""

from typing import Any

_registered = False


def register() -> None:
    """`vllm.general_plugins`: runs in every process of a server, often more than once, before anything is served.

    Without `kif` in --additional-config the server behaves as if KIF were not installed. Raises RuntimeError, which
    stops the process, where this vLLM is not the one that KIF knows.
    """
    global _registered
    if _registered:
        return
    from . import hooks

    hooks.install()
    _registered = True


def endpoints() -> Any:
    """`vllm.endpoint_plugins`: the admin routes. vLLM loads it only where VLLM_PLUGINS names `kif`."""
    from .front.endpoints import Endpoints

    return Endpoints()
