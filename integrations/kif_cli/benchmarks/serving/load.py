"""Requests to a server, so many at a time, streamed, with the times at which their tokens came."""

import http.client
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

from kif_runtime.errors import KifError, one_line

SECONDS = 600.0  # for one answer


class Times(NamedTuple):
    """perf_counter seconds: when the request was sent, and when each piece of its answer came."""

    sent: float
    pieces: list[float]


def measured(
    host: str, port: int, requests: Sequence[dict[str, Any]], concurrency: int, tokens: int
) -> dict[str, float]:
    """Send all `requests`, each for exactly `tokens` tokens, `concurrency` at a time.

    tokens_per_second: generated tokens by the time from the first request sent to the last token. ttft_p50, ttft_p99:
    seconds from sending a request to its first token. itl_p50, itl_p99: seconds between two tokens of one answer, over
    all. Raises KifError for an answer that is not as asked.
    """
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda request: _answer(host, port, request, tokens), requests))
    span = max(a.pieces[-1] for a in answers) - min(a.sent for a in answers)
    first = [a.pieces[0] - a.sent for a in answers]
    between = [b - a for answer in answers for a, b in pairwise(answer.pieces)]
    return {
        "seconds": span,
        "tokens_per_second": len(requests) * tokens / span,
        "ttft_p50": statistics.median(first), "ttft_p99": quantile(first, 0.99),
        "itl_p50": statistics.median(between), "itl_p99": quantile(between, 0.99),
    }  # fmt: skip


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(1000 * share) // 1000) - 1)]


def _answer(host: str, port: int, request: dict[str, Any], tokens: int) -> Times:
    body = json.dumps(request | {"stream": True, "stream_options": {"include_usage": True}})
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    try:
        sent, pieces, counted = time.perf_counter(), [], 0
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise KifError(f"a server answered {response.status}: {one_line(response.read().decode(), 300)}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            now, event = time.perf_counter(), json.loads(line[6:])
            if event.get("choices"):
                pieces.append(now)
            elif "usage" in event:
                counted = event["usage"]["completion_tokens"]
    except (OSError, http.client.HTTPException) as problem:
        raise KifError(f"a server did not answer ({one_line(problem, 200)}); its log says why") from None
    finally:
        connection.close()
    if counted != tokens or len(pieces) < 2:
        raise KifError(f"a server gave {counted} tokens in {len(pieces)} pieces where {tokens} were asked for")
    return Times(sent, pieces)
