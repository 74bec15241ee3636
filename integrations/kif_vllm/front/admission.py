"""Admission: what a request may ask of KIF, said with HTTP 400 before it reaches the engine.

The engine core has the last word (`engine.ledger`); here is what it last said. A request that names an id which is not
in it makes the front end ask again, so that a capsule loaded through another API server is known at once.
"""

import hashlib
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

from kif_runtime.errors import RequestError

from ..config import KifConfig, read_allowed
from ..engine.ledger import UNKNOWN
from ..sets import KEY

Inner = Callable[..., Any]

FRESH = 0.1  # seconds for which an answer of the engine is good

caller: ContextVar[str | None] = ContextVar("kif_caller", default=None)
"""SHA-256, in hex, of the API key that the running HTTP request came with."""

sole: "Admission | None" = None
"""The admission of this API server, where it is the only one and hears of every change, so that its view is current."""

accepted: ContextVar[list[tuple[Any, int]] | None] = ContextVar("kif_accepted", default=None)
"""A list to which the running HTTP request's requests go, with their number of samples, where evidence is asked for."""


class Admission:
    """One engine client's view: which ids there are, and who may name them."""

    def __init__(self, config: KifConfig) -> None:
        self.config = config
        self.allowed = None if config.allow is None else read_allowed(config.allow)
        self.ids: frozenset[str] = frozenset()
        self._learned = -FRESH

    def learn(self, status: dict[str, Any]) -> None:
        """What the engine says now."""
        self.ids = frozenset(capsule["id"] for capsule in status["capsules"])
        self._learned = time.monotonic()

    def asked(self, params: Any) -> list[str]:
        """The ids that a request names. Raises RequestError for anything but a short list of texts."""
        value = (getattr(params, "extra_args", None) or {}).get(KEY)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(id, str) for id in value):
            raise RequestError('vllm_xargs: "kif" is a list of capsule ids, such as ["it"]')
        if len(value) > self.config.max_named:
            raise RequestError(
                f'vllm_xargs: "kif" names {len(value)} capsules, at most {self.config.max_named} are allowed'
            )
        return value

    def check(self, params: Any) -> None:
        """Raise RequestError unless every id is there and the caller may name it: the same words for both."""
        asked = self.asked(params)
        if any(id not in self.ids or not self._may(id) for id in asked):
            raise RequestError(UNKNOWN)

    def is_stale(self, params: Any) -> bool:
        """Whether the engine should be asked again before `check`; not so often that unknown ids could keep it busy."""
        return any(id not in self.ids for id in self.asked(params)) and time.monotonic() - self._learned >= FRESH

    def check_input(self, request: Any) -> None:
        """Raise RequestError for input in which names cannot be recognised, unless the server lets it in."""
        if request.prompt_embeds is not None and not self.config.prompt_embeds:
            raise RequestError("prompt_embeds are refused here: KIF recognises subjects in tokens; send text")
        if request.mm_features and not self.config.multimodal:
            raise RequestError("multimodal input is refused here: KIF recognises subjects in text; send text")
        if request.resumable:
            raise RequestError(
                "streamed input is refused here: a request has one capsule set from its start to its end"
            )

    def _may(self, id: str) -> bool:
        if self.allowed is None:
            return True
        return id in self.allowed.get(caller.get() or "", ()) or id in self.allowed.get("*", ())


def of(processor: Any) -> Admission | None:
    """The admission of a vLLM InputProcessor, made at its first request; None for a server without KIF."""
    if "kif" not in processor.__dict__:
        config = KifConfig.of(processor.vllm_config)
        processor.kif = None if config is None else Admission(config)
    return processor.kif


def process_inputs(
    inner: Inner, processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    admission = of(processor)
    if admission is None:
        return inner(processor, request_id, prompt, params, *args, **kwargs)
    with _as_bad_request():
        admission.check(params)
    request = inner(processor, request_id, prompt, params, *args, **kwargs)
    with _as_bad_request():
        admission.check_input(request)
    if (watched := accepted.get()) is not None:
        watched.append((request, getattr(params, "n", 1)))
    return request


async def add_request_async(
    inner: Inner, engine: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    admission = of(engine.input_processor)
    if admission is not None:
        with _as_bad_request():
            stale = admission.is_stale(params)
        if stale:
            answers = await engine.engine_core.call_utility_all_async("kif_call", "status", {})
            admission.learn(answers[0]["result"])
    return await inner(engine, request_id, prompt, params, *args, **kwargs)


def add_request(inner: Inner, engine: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    admission = of(engine.input_processor)
    if admission is not None:
        with _as_bad_request():
            stale = admission.is_stale(params)
        if stale:
            admission.learn(ask(engine, "status")["result"])
    return inner(engine, request_id, prompt, params, *args, **kwargs)


def ask(engine: Any, command: str, **arguments: Any) -> dict[str, Any]:
    """A command to the engine core of an offline `LLMEngine`, in this process or another."""
    client = engine.engine_core
    if hasattr(client, "call_utility"):
        return client.call_utility("kif_call", command, arguments)
    return client.engine_core.kif_call(command, arguments)


def refuse_early(inner: Inner, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Before an answer begins: what `process_inputs` refuses would, in a stream, be an error after HTTP 200."""
    if sole is not None and KEY in (request.vllm_xargs or {}):
        with _as_bad_request():
            sole.check(_Named(request.vllm_xargs))
    return inner(request, *args, **kwargs)


class _Named(NamedTuple):
    """As much of SamplingParams as `check` looks at."""

    extra_args: dict[str, Any]


def refuse_beams(inner: Inner, request: Any, *args: Any, **kwargs: Any) -> Any:
    if KEY in (request.vllm_xargs or {}):
        with _as_bad_request():
            raise RequestError("beam search does not carry vllm_xargs to the model; name capsules without it")
    return inner(request, *args, **kwargs)


class _as_bad_request:
    """A RequestError becomes the exception that vLLM answers with HTTP 400."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RequestError):
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


def digest_of_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
