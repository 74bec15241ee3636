"""The endpoint plugin: admin routes under /kif, evidence in answers, metrics, and the watch over the directory.

vLLM loads it only where VLLM_PLUGINS names `kif`; `kif serve` sees to that. Without it the server suppresses all the
same, with what its directory held at start.
"""

import logging
import re
from argparse import Namespace
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict

from ..config import ADMIN_KEY, admin_key
from .control import Control, ControlError
from .evidence import EvidenceMiddleware
from .metrics import MetricsMiddleware

_STATUS = {"RequestError": 404, "CapsuleError": 400, "BankError": 409, "ProofError": 500}


class Load(BaseModel):
    """file: a name in the server's directory. in_flight: what becomes of running requests; by default those that a
    mandatory capsule concerns are aborted, and others finish with what they were frozen with."""

    model_config = ConfigDict(extra="forbid", strict=True)

    file: str
    in_flight: Literal["finish", "abort"] | None = None


class Endpoints:
    """vLLM's EndpointPlugin."""

    name = "kif"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        additional = getattr(app.state.args, "additional_config", None)
        if not isinstance(additional, dict) or "kif" not in additional:
            return
        app.state.kif = self.control = Control(admin_key())
        app.add_middleware(EvidenceMiddleware, control=self.control)
        app.add_middleware(MetricsMiddleware, control=self.control)
        if self.control.key is not None:
            app.include_router(router)
            logging.getLogger("uvicorn.access").addFilter(_without_ids)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        if hasattr(self, "control") and engine_client is not None:
            await self.control.start(engine_client)


def _without_ids(record: logging.LogRecord) -> bool:
    """An id may be a subject's name: take it out of the line that uvicorn logs for a call, and let the line pass."""
    if isinstance(record.args, tuple):
        record.args = tuple(_ID.sub(r"\1…", a) if isinstance(a, str) else a for a in record.args)
    return True


_ID = re.compile(r"(/kif/capsules/)[^ ?]+")
router = APIRouter(prefix="/kif")


def _control(request: Request) -> Control:
    control: Control = request.app.state.kif
    if not control.is_admin(request.headers):
        raise HTTPException(
            401, f"the admin key is missing or wrong: send it as a bearer token; it is the server's {ADMIN_KEY}"
        )
    return control


async def _do(request: Request, command: str, **arguments: Any) -> dict[str, Any]:
    try:
        return await _control(request).command(command, **arguments)
    except ControlError as problem:
        raise HTTPException(_STATUS.get(problem.kind, 500), str(problem)) from None


@router.get("/capsules")
async def capsules(request: Request) -> dict[str, Any]:
    """What is loaded: ids, the first 12 digits of each content digest, whether it is mandatory, and the room."""
    return await _do(request, "status")


@router.post("/capsules")
async def load(request: Request, body: Load) -> dict[str, Any]:
    """Load, or load again, a capsule of the server's directory."""
    return await _do(request, "load", name=body.file, in_flight=body.in_flight)


@router.delete("/capsules/{id}")
async def unload(request: Request, id: str, in_flight: Literal["finish", "abort"] | None = None) -> dict[str, Any]:
    """Take a capsule out. Its file stays, and loading it again undoes this."""
    return await _do(request, "unload", id=id, in_flight=in_flight)


@router.post("/verify")
async def verify(request: Request) -> dict[str, Any]:
    """The proof of the start-up, again, between the requests that run."""
    return await _do(request, "verify")


@router.get("/status")
async def status(request: Request) -> dict[str, Any]:
    """Counts since the start."""
    return await _do(request, "figures")
