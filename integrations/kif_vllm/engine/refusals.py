"""What KIF does not serve, said at start-up: it would leave tokens unsuppressed, or was never shown not to."""

from collections.abc import Mapping
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
        (
            not _kept_by_block_hash(config.kv_transfer_config),
            "this --kv-transfer-config: KV from outside would be read under another capsule set than it was made under",
        ),
        (config.cache_config.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill: later blocks see fewer tokens"),
    ):
        if wrong:
            raise ModelError(f"KIF does not serve with {what}; switch it off, or serve without KIF")


# Read in vLLM's source: these two keep KV where only this server writes, under vLLM's block hashes and nothing else;
# these begin with the salt. Others key by token ids, or fetch what a request points at. (What --ec-transfer-config
# moves are encoders' outputs, made before any site.)
_BY_BLOCK_HASH = ("OffloadingConnector", "SimpleCPUOffloadConnector")


def _kept_by_block_hash(transfer: Any) -> bool:
    """Whether no KV can come in under another set: `transfer` is vLLM's KVTransferConfig, or None."""
    if transfer is None or transfer.kv_connector is None:
        return True
    return _is_proven(vars(transfer))


def _is_proven(connector: Mapping[str, Any]) -> bool:
    more = connector.get("kv_connector_extra_config") or {}
    if connector.get("kv_connector_module_path"):
        return False
    if connector.get("kv_connector") == "MultiConnector":
        children = more.get("connectors") or ()
        return bool(children) and all(map(_is_proven, children))
    own = more.get("spec_name", "CPUOffloadingSpec") == "CPUOffloadingSpec" and "cache_policy_module_path" not in more
    return own and connector.get("kv_connector") in _BY_BLOCK_HASH
