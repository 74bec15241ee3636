"""KIF's counters on vLLM's own /metrics: numbers only, capsules by the first 12 hex digits of their content digest."""

import logging
from typing import Any

from prometheus_client import Counter, Gauge
from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger("vllm.kif")

_COUNTERS = {
    "tokens_seen": "Tokens computed by the model.",
    "tokens_suppressed": "Tokens on which at least one capsule fired.",
    "requests_touched": "Requests with such a token.",
    "gate_seconds": "Time spent at sites (on a CPU; on a GPU the time to launch).",
    "forward_seconds": "Time spent in the model's forward, sites included (on a CPU; on a GPU the time to launch).",
}


class Metrics:
    """Counters follow the workers' own totals; they are brought up to date when /metrics is read."""

    def __init__(self, per_capsule: bool) -> None:
        self._counters = {name: Counter(f"kif_{name}", text) for name, text in _COUNTERS.items()}
        self._share = Gauge(
            "kif_gate_share", "Share of the forward's time spent at sites.", multiprocess_mode="mostrecent"
        )
        self._capsules = (
            Counter("kif_capsule_tokens", "Tokens on which a capsule fired, by its content digest.", ["capsule"])
            if per_capsule
            else None
        )
        self._last: dict[str, float] = {}

    def update(self, figures: list[dict[str, Any]]) -> None:
        """figures: one table for each engine, as `worker.Suppression.figures` gives it."""
        for name, counter in self._counters.items():
            counter.inc(self._new(name, sum(f[name] for f in figures)))
        forward = sum(f["forward_seconds"] for f in figures)
        self._share.set(sum(f["gate_seconds"] for f in figures) / forward if forward else 0.0)
        if self._capsules is None:
            return
        for digest in {digest for f in figures for digest in f["capsules"]}:
            total = sum(f["capsules"].get(digest, 0) for f in figures)
            if total:
                self._capsules.labels(capsule=digest[:12]).inc(self._new(digest, total))

    def _new(self, name: str, total: float) -> float:
        """What came since the last time."""
        before = self._last.get(name, 0.0)
        self._last[name] = total
        return max(0.0, total - before)


class MetricsMiddleware:
    """Before /metrics is answered the counters are brought up to date."""

    def __init__(self, app: ASGIApp, control: Any) -> None:
        self.app, self.control = app, control

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")).startswith("/metrics"):
            try:
                await self.control.measure()
            except Exception as problem:  # vLLM's own figures are wanted most where its engine is in trouble
                log.warning("KIF's metrics are not up to date: %s", problem)
        await self.app(scope, receive, send)
