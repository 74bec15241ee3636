"""What the server does not start with: KV that comes from outside must not be read under another capsule set."""

from types import SimpleNamespace

import pytest

from kif_runtime.errors import ModelError
from kif_vllm.engine.refusals import refuse_what_is_not_proven


def served(transfer=None):
    """As much of a VllmConfig as is looked at, of a server that is not refused."""
    return SimpleNamespace(
        model_config=SimpleNamespace(runner_type="generate", is_encoder_decoder=False, is_moe=False),
        parallel_config=SimpleNamespace(
            use_ubatching=False, prefill_context_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1,
            enable_elastic_ep=False,
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        kv_transfer_config=transfer,
    )  # fmt: skip


def through(name, module=None, **more):
    return {"kv_connector": name, "kv_connector_module_path": module, "kv_connector_extra_config": more}


ALLOWED = [
    through("OffloadingConnector", cpu_bytes_to_use=1),
    through("OffloadingConnector", spec_name="CPUOffloadingSpec"),
    through("SimpleCPUOffloadConnector"),
    through("MultiConnector", connectors=[through("OffloadingConnector"), through("SimpleCPUOffloadConnector")]),
    through(None),
]
REFUSED = [
    through("ExampleConnector"),
    through("NixlConnector"),
    through("LMCacheConnectorV1"),
    through("NobodyKnowsIt"),
    through("OffloadingConnector", module="somebodys.module"),
    through("OffloadingConnector", spec_name="TieringOffloadingSpec"),
    through("OffloadingConnector", cache_policy_module_path="somebodys.module"),
    through("MultiConnector"),
    through("MultiConnector", connectors=[through("OffloadingConnector"), through("ExampleConnector")]),
]


@pytest.mark.parametrize("transfer", [None, *(SimpleNamespace(**t) for t in ALLOWED)])
def test_kv_that_is_kept_under_block_hashes_in_this_server_is_served_with(transfer):
    refuse_what_is_not_proven(served(transfer))


@pytest.mark.parametrize("transfer", REFUSED)
def test_kv_that_may_come_from_another_set_is_refused_in_one_line_that_names_the_flag(transfer):
    with pytest.raises(ModelError, match="--kv-transfer-config") as caught:
        refuse_what_is_not_proven(served(SimpleNamespace(**transfer)))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_of_vllms_connectors_two_are_served_with():
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    def is_served(name):
        try:
            refuse_what_is_not_proven(served(KVTransferConfig(kv_connector=name, kv_role="kv_both")))
        except ModelError:
            return False
        return True

    assert {name for name in KVConnectorFactory._registry if is_served(name)} == {
        "OffloadingConnector", "SimpleCPUOffloadConnector",
    }  # fmt: skip
