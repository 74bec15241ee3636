"""One engine's KIF, with a worker that agrees to everything."""

from types import SimpleNamespace

import pytest
from test_plugin_worker import CAPSULES, SITE, room

from capsules import BLOCKS, D, capsule, signature
from kif_runtime.errors import BankError
from kif_vllm.engine import hooks
from kif_vllm.engine.ledger import Ledger
from kif_vllm.engine.library import SUFFIX, Library, Served
from kif_vllm.engine.service import PROBES, Service


def one(mandatory=(), capsules=1):
    """A service with room for so many capsules."""
    made = Service.__new__(Service)
    made.ledger, made.held, made.room = Ledger(mandatory), {}, room(capsules=PROBES + capsules)
    made._rpc = lambda function, *args: [{}]
    made._abort = len  # nobody runs
    return made


@pytest.fixture
def service():
    return one()


@pytest.fixture
def watched(tmp_path):
    """watched(*ids, ...) -> a service of a directory with these capsules, all loaded."""

    def start(*ids, **more):
        made = one(**more)
        made.library = Library(tmp_path, Served(CAPSULES["a"].model, D, BLOCKS))
        for id in ids:
            put(tmp_path, id)
        made._change(load=made.library.read_all())
        return made

    return start


def path(folder, id):
    return folder / f"{id}{SUFFIX}"


def put(folder, id, capsule=None):
    (capsule or CAPSULES[id]).save(path(folder, id), overwrite=True)


def loaded(service):
    return set(service.ledger.current)


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


def test_where_there_is_no_room_left_one_file_can_take_anothers_place(watched, tmp_path):
    service = watched("b", capsules=1)
    path(tmp_path, "b").unlink()
    put(tmp_path, "a")
    assert [c["act"] for c in service.rescan()["changes"]] == ["unload", "load"]
    assert loaded(service) == {"a"}


def test_a_file_for_which_there_was_no_room_is_loaded_when_there_is_and_spoken_of_once(watched, tmp_path):
    service = watched("a", capsules=1)
    put(tmp_path, "b")
    first, second = service.rescan(), service.rescan()
    assert (len(first["refused"]), first["waiting"]) == (1, 1)
    assert (second["refused"], second["waiting"]) == ([], 1)
    path(tmp_path, "a").unlink()
    assert service.rescan()["waiting"] == 0
    assert loaded(service) == {"b"}
    assert service.rescan()["changes"] == []


def test_a_file_that_can_never_be_loaded_here_does_not_hold_up_the_others_and_is_not_tried_again(watched, tmp_path):
    service = watched("b", capsules=4)
    put(tmp_path, "a", capsule(id="a", signatures=(signature(SITE + 1, rank=2),)))
    put(tmp_path, "c")
    found = service.rescan()
    assert loaded(service) == {"b", "c"}
    assert (len(found["refused"]), found["waiting"]) == (1, 0)
    assert service.rescan()["refused"] == []


def test_a_capsule_that_the_configuration_names_as_mandatory_stays_when_its_file_goes(watched, tmp_path):
    service = watched("a", "b", mandatory=("a",), capsules=4)
    path(tmp_path, "a").unlink()
    path(tmp_path, "b").unlink()
    found = service.rescan()
    assert loaded(service) == {"a"} and service.ledger.mandatory == ["a"]
    assert len(found["refused"]) == 1
    assert CAPSULES["a"].digest[:12] in found["refused"][0] and "'a'" not in found["refused"][0]
    assert service.rescan()["refused"] == []
    put(tmp_path, "a", capsule(id="a", signatures=(signature(SITE, rank=2, seed=9),)))
    assert len(service.rescan()["changes"]) == 1
    assert loaded(service) == {"a"}


def test_where_all_of_the_directory_is_mandatory_what_leaves_it_is_not_any_more(watched, tmp_path):
    service = watched("a", "b", mandatory="all", capsules=4)
    path(tmp_path, "a").unlink()
    assert service.rescan()["refused"] == []
    assert loaded(service) == {"b"}


def test_requests_are_expected_only_once_vllms_own_set_up_is_over(monkeypatch, tmp_path):
    """Its warm-up is in there."""
    acts = []
    monkeypatch.setattr(hooks, "Service", lambda core, config: SimpleNamespace(serve=lambda: acts.append("serve")))
    vllm = SimpleNamespace(additional_config={"kif": {"capsules": str(tmp_path)}})
    hooks.set_up(lambda core, config: acts.append("set-up"), SimpleNamespace(), vllm)
    assert acts == ["set-up", "serve"]
