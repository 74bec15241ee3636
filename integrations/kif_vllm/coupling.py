"""Every function and class of vLLM that KIF touches, with the parameters that it expects.

Attributes of their instances are read beside them, and the tests on the real engine cover those. `check` compares the
table with the installed vLLM, so that a new version fails with names, at start-up and in a test.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from importlib import import_module
from typing import Any, NamedTuple

VERSIONS = ("0.32",)


class Symbol(NamedTuple):
    """`where` is module:name. `parameters` are the names of its parameters; None for what is no function."""

    where: str
    parameters: str | None
    why: str


# Wrapped: KIF runs before or after them. Why no public hook would do is said here.
WRAPPED = (
    Symbol(
        "vllm.v1.engine.core:EngineCore._initialize_kv_caches", "self vllm_config",
        "between loading and the first forward, which is when sites must be set up; no plugin group runs there",
    ),
    Symbol(
        "vllm.v1.engine.core:EngineCore.preprocess_add_request", "self request",
        "every request of every front end, before its cache blocks are hashed: sets are frozen and salted here",
    ),
    Symbol(
        "vllm.v1.engine.core:EngineCore.add_request", "self request request_wave",
        "a request that a change aborts between its freezing and its scheduling must not be scheduled",
    ),
    Symbol("vllm.v1.engine.core:EngineCoreProc.run_busy_loop", "self", "the proof runs before the first request"),
    Symbol(
        "vllm.v1.engine.core_client:InprocClient.__init__",
        "self vllm_config executor_class log_stats executor_fail_callback",
        "the same proof where the engine runs in the caller's process (offline use)",
    ),
    Symbol(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        "self request_id prompt params supported_tasks arrival_time lora_request tokenization_kwargs trace_headers "
        "priority data_parallel_rank resumable session_id kv_hints",
        "admission: an exception here is HTTP 400; a logits processor's check would abort the V2 runner's start",
    ),
    Symbol(
        "vllm.v1.engine.async_llm:AsyncLLM.add_request",
        "self request_id prompt params arrival_time lora_request tokenization_kwargs trace_headers priority "
        "data_parallel_rank session_id prompt_text reasoning_ended reasoning_parser_kwargs kv_hints",
        "the last place that can ask the engine which capsules it holds, before the check above, which cannot wait",
    ),
    Symbol(
        "vllm.v1.engine.llm_engine:LLMEngine.add_request",
        "self request_id prompt params arrival_time lora_request tokenization_kwargs trace_headers priority "
        "session_id prompt_text kv_hints",
        "the same, offline",
    ),
    Symbol(
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_sampling_params",
        "self max_tokens default_sampling_params",
        "before a stream begins: later an error could not be HTTP 400 any more",
    ),
    Symbol(
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_sampling_params",
        "self max_tokens default_sampling_params",
        "as for chat",
    ),
    Symbol(
        "vllm.entrypoints.openai.responses.protocol:ResponsesRequest.to_sampling_params",
        "self default_max_tokens default_sampling_params",
        "as for chat",
    ),
    Symbol(
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_beam_search_params",
        "self max_tokens default_sampling_params", "beam search drops vllm_xargs, so a named capsule would not apply",
    ),
    Symbol(
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_beam_search_params",
        "self max_tokens default_sampling_params", "as for chat",
    ),
)  # fmt: skip

# Wrapped on the one instance that a worker holds, after its model is loaded.
INSTANCES = (
    Symbol(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs", "self scheduler_output num_scheduled_tokens",
        "V1 runner: the batch is final, in its order",
    ),
    Symbol(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward",
        "self input_ids positions intermediate_tensors inputs_embeds model_kwargs",
        "V1 runner: what fired is counted after each forward",
    ),
    Symbol(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_run",
        "self num_tokens cudagraph_runtime_mode force_attention uniform_decode allow_microbatching skip_eplb "
        "is_profile create_mixed_batch remove_lora is_graph_capturing num_active_loras profile_seq_lens "
        "randomize_inputs",
        "V1 runner: dummy tokens belong to no request",
    ),
    Symbol(
        "vllm.v1.worker.gpu.model_states.interface:ModelState.add_request", "self req_index new_req_data",
        "V2 runner: a request enters, also one that was preempted, with its parameters",
    ),
    Symbol("vllm.v1.worker.gpu.model_states.interface:ModelState.remove_request", "self req_id", "V2: it leaves"),
    Symbol(
        "vllm.v1.worker.gpu.model_states.interface:ModelState.prepare_inputs", "self input_batch req_states",
        "V2 runner: the batch is final; called before eager forwards and before graphs are replayed",
    ),
)  # fmt: skip

# Called or read.
USED = (
    Symbol("vllm.config:VllmConfig", None, "additional_config, and what is refused at start-up"),
    Symbol("vllm.config:KVTransferConfig", None, "which connectors bring in KV"),
    Symbol("vllm.exceptions:VLLMValidationError", None, "HTTP 400"),
    Symbol(
        "vllm.v1.engine.core:EngineCore.collective_rpc", "self method timeout args kwargs", "calls into every worker"
    ),
    Symbol("vllm.v1.engine.core:EngineCore.abort_requests", "self request_ids", "the proof's request, if it hangs"),
    Symbol("vllm.v1.engine.core:EngineCoreProc._process_engine_step", "self", "runs the proof's request"),
    Symbol("vllm.v1.engine.core:EngineCoreProc._send_abort_outputs", "self aborted_reqs", "tells clients of aborts"),
    Symbol("vllm.v1.core.sched.scheduler:Scheduler.finish_requests", "self request_ids finished_status", "aborts"),
    Symbol("vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async", "self method args",
           "a change returns after every engine acknowledged it"),
    Symbol("vllm.v1.engine.core_client:SyncMPClient.call_utility", "self method args", "offline: which capsules"),
    Symbol("vllm.model_executor.layers.layernorm:RMSNorm.forward_native", "self x residual", "its result"),
    Symbol("vllm.model_executor.layers.layernorm:GemmaRMSNorm.forward_native", "self x residual", "its result"),
    Symbol("vllm.utils.torch_utils:direct_register_custom_op",
           "op_name op_func mutates_args fake_impl target_lib dispatch_key tags", "sites in compiled graphs"),
    Symbol("vllm.utils.torch_utils:_encode_layer_name", "layer_name", "a site's name in a graph"),
    Symbol("vllm.utils.torch_utils:_resolve_layer_name", "layer_name", "the name again, inside the op"),
    Symbol("vllm.forward_context:get_forward_context", "", "the name's site, of the engine that runs"),
    Symbol("vllm.v1.request:Request", None, "the proof's request"),
    Symbol("vllm.v1.request:RequestStatus", None, "aborted"),
    Symbol("vllm.plugins.endpoint_plugins.interface:EndpointPlugin", None, "admin routes"),
)  # fmt: skip

Around = Callable[..., Any]


def resolve(where: str) -> tuple[Any, str, Any]:
    """(owner, name, object) of module:dotted.name. Raises RuntimeError, with the name, where it is not there."""
    module, _, path = where.partition(":")
    try:
        owner: Any = import_module(module)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        return owner, name, getattr(owner, name)
    except (ImportError, AttributeError) as problem:
        raise RuntimeError(f"KIF needs vLLM's {where}, which this vLLM has not ({problem})") from problem


def problems(symbols: Iterable[Symbol] = (*WRAPPED, *INSTANCES, *USED)) -> list[str]:
    """One line for each symbol that is missing or takes other parameters than expected."""
    found = []
    for symbol in symbols:
        try:
            target = resolve(symbol.where)[2]
        except RuntimeError as problem:
            found.append(str(problem))
            continue
        if symbol.parameters is not None:
            there = list(inspect.signature(target).parameters)
            if there != symbol.parameters.split():
                found.append(f"vLLM's {symbol.where} takes {there}, KIF expects {symbol.parameters.split()}")
    return found


def check(symbols: Iterable[Symbol]) -> None:
    """Raise RuntimeError with every problem, if there is one."""
    if found := problems(symbols):
        import vllm

        raise RuntimeError(f"KIF knows vLLM {', '.join(VERSIONS)}, this is {vllm.__version__}: " + "; ".join(found))


def wrap(where: str, around: Around) -> None:
    """Replace a function in WRAPPED: `around(inner, *args, **kwargs)` runs instead. Doing it again does nothing."""
    if where not in {symbol.where for symbol in WRAPPED}:
        raise RuntimeError(f"{where} is not in the table of what KIF wraps")
    owner, name, inner = resolve(where)
    if hasattr(inner, "kif_wraps"):
        return

    @wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    wrapped.kif_wraps = inner  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)
