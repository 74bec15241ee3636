"""Who calls, for the allow-list; and `kif: {applied, fired}` in answers to requests that carry the admin key."""

import json
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import admission

DONE = b"data: [DONE]"  # what ends a stream of chat or completion
COMPLETED = b"event: response.completed\ndata: "  # and what ends one of /v1/responses, one event to a message


class EvidenceMiddleware:
    """An admin sends its key as X-KIF-Key, beside whatever Authorization the server wants."""

    def __init__(self, app: ASGIApp, control: Any) -> None:
        self.app, self.control = app, control

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        admission.caller.set(admission.digest_of_key(token) if scheme.lower() == "bearer" and token else None)
        if headers.get("x-kif-key") is None or not self.control.is_admin(headers):
            await self.app(scope, receive, send)
            return
        requests: list[tuple[Any, int]] = []
        admission.accepted.set(requests)
        await self.app(scope, receive, _Answer(send, requests, self.control))


class _Answer:
    """Passes an answer on, with the evidence added: as a key of a JSON object, also of the one that ends a stream of
    /v1/responses, or as a last event of other streams."""

    def __init__(self, send: Send, requests: list[tuple[Any, int]], control: Any) -> None:
        self.send, self.requests, self.control = send, requests, control
        self.start: Message | None = None
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            if kind.startswith("application/json") and message["status"] == 200:
                self.start = message
                return
            await self.send(message)
        elif message["type"] != "http.response.body":
            await self.send(message)
        elif self.start is None:
            await self._stream(message)
        else:
            await self._object(message)

    async def _object(self, message: Message) -> None:
        self.body += message.get("body", b"")
        if message.get("more_body", False):
            return
        assert self.start is not None
        content = json.loads(self.body)
        if isinstance(content, dict) and self.requests:
            content["kif"] = await self._evidence()
            self.body = json.dumps(content, ensure_ascii=False).encode()
            MutableHeaders(raw=self.start["headers"])["content-length"] = str(len(self.body))
        await self.send(self.start)
        await self.send({"type": "http.response.body", "body": self.body})

    async def _stream(self, message: Message) -> None:
        body = message.get("body", b"")
        if self.requests and DONE in body:
            before, _, after = body.partition(DONE)
            event = {
                "id": "kif",
                "object": "kif",
                "created": 0,
                "model": "",
                "choices": [],
                "kif": await self._evidence(),
            }
            message = message | {"body": before + b"data: " + json.dumps(event).encode() + b"\n\n" + DONE + after}
        elif self.requests and body.startswith(COMPLETED):
            event = json.loads(body.removeprefix(COMPLETED))
            event["response"]["kif"] = await self._evidence()
            message = message | {"body": COMPLETED + json.dumps(event).encode() + b"\n\n"}
        await self.send(message)

    async def _evidence(self) -> dict[str, Any]:
        return await self.control.evidence([id for request, n in self.requests for id in engine_ids(request, n)])


def engine_ids(request: Any, n: int) -> list[str]:
    """The ids under which the engine knows a request of n samples; vLLM makes the last of them of the object itself."""
    if n == 1:
        return [request.request_id]
    parent = request.request_id.partition("_")[2]
    return [f"{sample}_{parent}" for sample in range(n)]
