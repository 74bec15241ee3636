"""What KIF does not serve, said at start-up: it would leave tokens unsuppressed, or was never shown not to."""

from typing import Any

from kif_runtime.errors import ModelError


def refuse_what_is_not_proven(config: Any) -> None:
    """Raise ModelError, naming the setting, for the first thing in a VllmConfig that KIF does not serve."""
    model, parallel = config.model_config, config.parallel_config
    for wrong, what in (
        (model.runner_type != "generate", f"a {model.runner_type} model; KIF serves text generation"),
        (model.is_encoder_decoder, "an encoder-decoder model; KIF serves decoders"),
        (getattr(model, "is_diffusion", False), "a diffusion model; its tokens are computed again and again"),
        (parallel.use_ubatching, "micro-batching (--enable-dbo, --ubatch-size): two slices would share one row table"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism: a rank sees a part of each prompt"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism: not shown to be right"),
        (
            parallel.data_parallel_size > 1 and model.is_moe,
            "data parallelism of a mixture of experts: its engines must step together, the proof steps one",
        ),
        (parallel.enable_elastic_ep, "elastic expert parallelism: ranks come and go"),
        (config.cache_config.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill: later blocks see fewer tokens"),
    ):
        if wrong:
            raise ModelError(f"KIF does not serve with {what}; switch it off, or serve without KIF")
