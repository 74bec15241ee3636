"""Evidence in streams, put to the middleware in the form that vLLM sends them in; test_server_admin.py has a server."""

import asyncio
import json
import logging

import pytest

pytestmark = pytest.mark.slow  # it needs what vLLM brings

FOUND = {"applied": ["it"], "fired": {"it": 2}}
CREATED = b'event: response.created\ndata: {"type":"response.created","response":{"id":"x"}}\n\n'
COMPLETED = b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"x"}}\n\n'


def streamed(pieces, key):
    """What a client with this key gets of a stream of `pieces`."""
    from kif_vllm.front import admission
    from kif_vllm.front.evidence import EvidenceMiddleware

    class Control:
        def is_admin(self, headers):
            return headers.get("x-kif-key") == "right"

        async def evidence(self, requests):
            assert requests == ["cmpl-1"]
            return FOUND

    async def app(scope, receive, send):
        if (accepted := admission.accepted.get()) is not None:
            accepted.append((type("Request", (), {"request_id": "cmpl-1"}), 1))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def run():
        sent = []

        async def send(message):
            sent.append(message.get("body", b""))

        scope = {"type": "http", "path": "/v1/responses", "headers": [(b"x-kif-key", key)]}
        await EvidenceMiddleware(app, Control())(scope, None, send)
        return b"".join(sent)

    return asyncio.run(run())


def test_the_last_event_of_responses_holds_the_evidence_for_admins_alone():
    assert streamed([CREATED, COMPLETED], b"wrong") == CREATED + COMPLETED
    got = streamed([CREATED, COMPLETED], b"right")
    assert got.startswith(CREATED)
    event, data = got.removeprefix(CREATED).decode().strip().split("\n")
    assert event == "event: response.completed"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "response.completed",
        "response": {"id": "x", "kif": FOUND},
    }


def test_other_streams_get_an_event_of_their_own_before_the_end():
    pieces = [b'data: {"id":"x"}\n\n', b"data: [DONE]\n\n"]
    assert streamed(pieces, b"wrong") == b"".join(pieces)
    first, second, end = streamed(pieces, b"right").decode().strip().split("\n\n")
    assert (first + "\n\n").encode() == pieces[0] and end == "data: [DONE]"
    assert json.loads(second.removeprefix("data: "))["kif"] == FOUND


@pytest.mark.parametrize("path", ["/kif/capsules/a-subject", "/kif/capsules/a-subject?in_flight=finish"])
def test_the_access_log_tells_of_a_call_and_not_whose_capsule_it_was(path):
    from kif_vllm.front.endpoints import _without_ids

    line = '%s - "%s %s HTTP/%s" %d'
    record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, line, ("host", "DELETE", path, "1.1", 200), None)
    assert _without_ids(record)
    assert record.getMessage() == f'host - "DELETE {path.replace("a-subject", "…")} HTTP/1.1" 200'
