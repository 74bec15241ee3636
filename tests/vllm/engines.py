"""A real vLLM engine in this process, with what the tests ask of it. vllm is imported when the first one is made."""

import gc
import os
from dataclasses import dataclass
from typing import Any

# One worker, in this process: its runner and its sites can then be looked at.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

FLAGS = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 64, "seed": 0, "block_size": 32,
    "distributed_executor_backend": "uni", "disable_log_stats": True,
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """logprobs: for each generated token, {token id: log-probability} of the likeliest; prompt_logprobs likewise."""

    id: str
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]
    prompt_logprobs: tuple[dict[int, float], ...]
    cached: int
    fired: dict[str, int]


class Engine:
    """`kif`: the kif table of --additional-config; without it the server is stock vLLM."""

    def __init__(self, model: Any, kif: dict[str, Any] | None = None, **flags: Any) -> None:
        from vllm import LLM

        additional = {} if kif is None else {"kif": kif | {"capsules": str(kif["capsules"])}}
        self.llm = LLM(str(model), additional_config=additional, **FLAGS | flags)
        self.core = self.llm.llm_engine.engine_core.engine_core

    @property
    def worker(self) -> Any:
        """The worker's `Suppression`."""
        return self.core.model_executor.driver_worker.worker.model_runner.kif

    def command(self, command: str, **arguments: Any) -> dict[str, Any]:
        return self.core.kif_call(command, arguments)

    def ask(
        self, prompts: list[Any], ids: Any = None, salt: str | None = None, lora: Any = None, **params: Any
    ) -> list[Answer]:
        """Greedy answers to texts or lists of token ids, together. ids: one list for all, or one for each prompt."""
        from vllm import SamplingParams

        asked = (
            ids
            if ids is not None and len(ids) == len(prompts) and isinstance(ids[0], list | None)
            else [ids] * len(prompts)
        )
        inputs = [{"prompt": p} if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts]
        inputs = [i | ({} if salt is None else {"cache_salt": salt}) for i in inputs]
        settings = {"temperature": 0.0, "max_tokens": 8, "logprobs": 5} | params
        options = [SamplingParams(**settings, extra_args=None if a is None else {"kif": a}) for a in asked]
        seen = self._watch_ids()
        try:
            outputs = self.llm.generate(inputs, options, use_tqdm=False, lora_request=lora)
        finally:
            internal = self._stop(seen)
        return [self._answer(output, internal[output.request_id]) for output in outputs]

    def _watch_ids(self) -> Any:
        """vLLM adds random characters to a request's id; evidence is kept under the id that it has then."""
        inner, found = self.core.preprocess_add_request, {}

        def watched(request: Any) -> Any:
            found[request.request_id.rpartition("-")[0]] = request.request_id
            return inner(request)

        self.core.preprocess_add_request = watched
        return found

    def _stop(self, found: dict[str, str]) -> dict[str, str]:
        del self.core.preprocess_add_request
        return found

    def _answer(self, output: Any, internal: str) -> Answer:
        def plain(entries: Any) -> tuple[dict[int, float], ...]:
            return tuple({t: lp.logprob for t, lp in e.items()} for e in entries or () if e)

        one = output.outputs[0]
        fired = self.command("evidence", requests=[internal])["result"]["fired"] if self.core.kif else {}
        return Answer(
            internal, one.text, tuple(one.token_ids), plain(one.logprobs), plain(output.prompt_logprobs),
            output.num_cached_tokens or 0, fired,
        )  # fmt: skip

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core
        gc.collect()
