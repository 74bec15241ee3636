"""One API server's hold on KIF: commands to every engine, who is an admin, the audit log, the watched directory."""

import asyncio
import hmac
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from kif_runtime.errors import KifError

from ..config import KifConfig
from . import admission
from .metrics import Metrics

log = logging.getLogger("vllm.kif")

CHANGES = ("load", "unload", "rescan")
RETRY = 5.0  # seconds until files that wait for room are tried again


class ControlError(KifError):
    """An engine refused a command. `kind` is the name of the KIF error that it had."""

    def __init__(self, message: object, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class Control:
    """key: that of the admin routes; None for a server without them."""

    def __init__(self, key: str | None) -> None:
        self.key = key
        self._engine: Any = None
        self._config: KifConfig | None = None
        self._metrics: Metrics | None = None
        self._lock = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, engine: Any) -> None:
        """Once the engine runs. With several API servers, the first looks after the directory."""
        self._engine, self._config = engine, KifConfig.of(engine.vllm_config)
        if self._config is None:
            return
        self._metrics = Metrics(self._config.capsule_metrics)
        await self._learn()
        if engine._client_count == 1:
            admission.sole = admission.of(engine.input_processor)
        if self._config.watch and getattr(engine.engine_core, "client_index", 0) == 0:
            self._tasks.append(asyncio.create_task(self._watch(self._config.watch)))

    def is_admin(self, headers: Mapping[str, str]) -> bool:
        """Whether a request carries the admin key, in X-KIF-Key or as its bearer token."""
        if self.key is None:
            return False
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = headers.get("x-kif-key") or (token if scheme.lower() == "bearer" else "")
        return hmac.compare_digest(given.encode(), self.key.encode())

    async def command(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Run a command in every engine, one after another in time; gives the first engine's answer.

        Returns after all of them acknowledged it. Raises ControlError.
        """
        if self._engine is None:
            raise ControlError("the engine is not up yet; try again")
        async with self._lock:
            answers = await self._engine.engine_core.call_utility_all_async("kif_call", command, arguments)
            refused = [answer for answer in answers if "error" in answer]
            if command in CHANGES:
                await self._learn()
                self._audit(command, answers)
        if refused and len(refused) < len(answers):
            raise ControlError(f"engines differ, restart the server: {refused[0]['error']}")
        if refused:
            raise ControlError(refused[0]["error"], refused[0].get("kind", ""))
        return answers[0]["result"]

    async def measure(self) -> None:
        """Bring the metrics up to date."""
        if self._metrics is not None:
            answers = await self._engine.engine_core.call_utility_all_async("kif_call", "figures", {})
            self._metrics.update([answer["result"] for answer in answers])

    async def evidence(self, requests: list[str]) -> dict[str, Any]:
        """{"applied": ids, "fired": id → tokens}, together for the requests of one HTTP request."""
        arguments = {"requests": requests}
        answers = await self._engine.engine_core.call_utility_all_async("kif_call", "evidence", arguments)
        applied: set[str] = set()
        fired: dict[str, int] = {}
        for answer in answers:  # a request ran in one of the engines
            applied.update(answer["result"]["applied"])
            for id, count in answer["result"]["fired"].items():
                fired[id] = fired.get(id, 0) + count
        return {"applied": sorted(applied), "fired": dict(sorted(fired.items()))}

    async def _learn(self) -> None:
        answers = await self._engine.engine_core.call_utility_all_async("kif_call", "status", {})
        if (known := admission.of(self._engine.input_processor)) is not None:
            known.learn(answers[0]["result"])

    async def _watch(self, seconds: float) -> None:
        """Rescan when a file of the directory was added, replaced or removed. After an error the watch goes on."""
        seen = None
        while True:
            pause = seconds
            try:
                now = await asyncio.to_thread(self._listing)
                if now != seen:
                    result = await self.command("rescan")
                    for problem in result["refused"]:
                        log.warning("KIF refused a file's change in its directory: %s", problem)
                    seen = now
                    if result["waiting"]:
                        seen, pause = None, max(seconds, RETRY)
            except OSError as problem:  # its text has a path, and a file's name may be that of a subject
                log.error("KIF cannot look after its directory: %s", problem.strerror or type(problem).__name__)
            except Exception as problem:
                log.error("KIF cannot look after its directory: %s", problem)
            await asyncio.sleep(pause)

    def _listing(self) -> list[tuple[str, int, int]]:
        assert self._config is not None
        found = []
        with os.scandir(self._config.capsules) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # gone since it was listed
                    if entry.is_file():
                        status = entry.stat()
                        found.append((entry.name, status.st_mtime_ns, status.st_size))
        return sorted(found)

    def _audit(self, command: str, answers: list[dict[str, Any]]) -> None:
        """One JSON line for each admin act that did something or was refused; digests only, never a name or an id."""
        if self._config is None or self._config.audit is None:
            return
        lines = []
        for engine, answer in enumerate(answers):
            act = {"time": time.time(), "engine": engine, "act": command}
            if "error" in answer:
                lines.append(act | {"refused": answer.get("kind", "error")})
                continue
            result = answer["result"]
            for change in result.get("changes", [result]):
                kept = {key: change[key] for key in ("digests", "in_flight", "aborted", "generation")}
                lines.append(act | kept | ({"file": change["act"]} if "act" in change else {}))
            lines += [act | {"refused": "file"} for _ in result.get("refused", ())]
        if lines:
            handle = os.open(self._config.audit, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
