"""Where KIF enters vLLM: the wraps, all of them here, and what runs in each."""

from . import coupling
from .engine import hooks as engine
from .front import admission

_CORE, _FRONT, _OPENAI = "vllm.v1.engine.core:", "vllm.v1.engine.", "vllm.entrypoints.openai."


def install() -> None:
    """Wrap what `coupling.WRAPPED` lists, after all of it was checked: all or nothing."""
    coupling.check(coupling.WRAPPED)
    for where, around in (
        (_CORE + "EngineCore._initialize_kv_caches", engine.set_up),
        (_CORE + "EngineCore.preprocess_add_request", engine.freeze),
        (_CORE + "EngineCore.add_request", engine.admit),
        (_CORE + "EngineCoreProc.run_busy_loop", engine.prove_then_run),
        (_FRONT + "core_client:InprocClient.__init__", engine.prove_in_process),
        (_FRONT + "input_processor:InputProcessor.process_inputs", admission.process_inputs),
        (_FRONT + "async_llm:AsyncLLM.add_request", admission.add_request_async),
        (_FRONT + "llm_engine:LLMEngine.add_request", admission.add_request),
        (_OPENAI + "chat_completion.protocol:ChatCompletionRequest.to_sampling_params", admission.refuse_early),
        (_OPENAI + "completion.protocol:CompletionRequest.to_sampling_params", admission.refuse_early),
        (_OPENAI + "responses.protocol:ResponsesRequest.to_sampling_params", admission.refuse_early),
        (_OPENAI + "chat_completion.protocol:ChatCompletionRequest.to_beam_search_params", admission.refuse_beams),
        (_OPENAI + "completion.protocol:CompletionRequest.to_beam_search_params", admission.refuse_beams),
    ):
        coupling.wrap(where, around)
    coupling.resolve(_CORE + "EngineCore")[2].kif_call = engine.call
