"""One engine's KIF, with a worker that agrees to everything."""

import pytest
from test_plugin_worker import CAPSULES, room

from kif_runtime.errors import BankError
from kif_vllm.engine.ledger import Ledger
from kif_vllm.engine.service import PROBES, Service


@pytest.fixture
def service():
    made = Service.__new__(Service)
    made.ledger, made.held, made.room = Ledger(()), {}, room(capsules=PROBES + 1)
    made._rpc = lambda function, *args: [{}]
    return made


def test_the_proofs_own_place_is_given_to_no_capsule(service):
    """Else a full server could not prove any more that it suppresses."""
    first, second = CAPSULES["a"], CAPSULES["b"]
    service._change(load=[first])
    with pytest.raises(BankError, match=r"room for 1 capsules .*nothing was changed"):
        service._change(load=[second])
    assert set(service.ledger.current) == {first.id} and len(service.held) == 1
    service._change(unload=[first.id])
    service._change(load=[second])
    assert set(service.ledger.current) == {second.id}
