"""The ledger: what is frozen stays frozen, what nothing uses goes, and salts follow content alone."""

import gc
import hashlib
from dataclasses import replace

import pytest

from capsules import capsule
from kif_runtime.errors import RequestError
from kif_vllm.engine.ledger import UNKNOWN, Ledger
from kif_vllm.sets import NOTHING, CapsuleSet, digest_of, salt, version

FRANCE, JAPAN = capsule(id="france"), capsule(id="japan")
FRANCE_2 = replace(FRANCE, calibration={"note": "mined again"})


def v(c):
    return version(c.id, c.digest)


def change(ledger, load=(), unload=()):
    ledger.commit(*ledger.preview(load, unload))


class Request:
    """Like vLLM's: an object with an id that lives as long as anything can schedule it."""

    def __init__(self, id):
        self.request_id = id


@pytest.fixture
def ledger():
    """France is mandatory, Japan may be named."""
    made = Ledger(["france"])
    change(made, [FRANCE, JAPAN])
    return made


def test_the_mandatory_set_applies_to_a_request_that_names_nothing(ledger):
    chosen = ledger.freeze("r", [])
    assert ledger.versions(chosen) == (v(FRANCE),)


def test_naming_adds_and_naming_a_mandatory_capsule_changes_nothing(ledger):
    assert ledger.versions(ledger.freeze("r", ["japan"])) == (v(FRANCE), v(JAPAN))
    assert ledger.freeze("s", ["japan", "france", "japan"]) == ledger.freeze("t", ["japan"])
    assert ledger.freeze("u", ["france"]) == ledger.freeze("w", [])


@pytest.mark.parametrize("asked", [["nobody"], ["japan", "nobody"], [["japan"]], [3]])
def test_what_is_not_there_is_refused_and_not_counted(ledger, asked):
    with pytest.raises(RequestError) as caught:
        ledger.freeze("r", asked)
    assert str(caught.value) == UNKNOWN
    assert ledger.live == 0


def test_a_request_keeps_its_versions_through_a_replacement(ledger):
    old = ledger.freeze("old", ["japan"])
    change(ledger, [FRANCE_2])
    new = ledger.freeze("new", ["japan"])
    assert ledger.versions(old) == (v(FRANCE), v(JAPAN))
    assert ledger.versions(new) == (v(FRANCE_2), v(JAPAN))
    assert ledger.salt(old, None) != ledger.salt(new, None)


def test_versions_are_retired_when_the_last_request_object_is_gone(ledger):
    held = {v(FRANCE), v(JAPAN), v(FRANCE_2)}
    request = Request("old")
    chosen = ledger.freeze("old", [])
    ledger.release_with(request)
    change(ledger, [FRANCE_2])
    assert ledger.retire(held) == ((), ())
    del request
    gc.collect()
    assert ledger.retire(held) == ((v(FRANCE),), (chosen.base,))
    assert ledger.retire(held - {v(FRANCE)}) == ((), ())


def test_requests_that_a_change_concerns_are_told(ledger):
    for id, asked in (("a", []), ("b", ["japan"])):
        ledger.freeze(id, asked)
    before = ledger.current
    change(ledger, unload=["japan"])
    assert ledger.touched_by([before["japan"]]) == ["b"]
    change(ledger, [FRANCE_2])
    assert sorted(ledger.touched_by([])) == ["a", "b"]


def test_unloading_what_is_not_there_is_refused(ledger):
    with pytest.raises(RequestError, match="nobody"):
        ledger.preview(unload=["nobody"])


def test_equal_sets_have_one_salt_whatever_is_mandatory():
    mandatory, named = Ledger("all"), Ledger([])
    for each in (mandatory, named):
        change(each, [FRANCE, JAPAN])
    a, b = mandatory.freeze("r", []), named.freeze("r", ["japan", "france"])
    assert a != b
    assert mandatory.salt(a, None) == named.salt(b, None)


def test_adding_a_capsule_leaves_the_salts_of_other_sets_alone():
    ledger = Ledger([])
    change(ledger, [FRANCE])
    before = ledger.salt(ledger.freeze("r", ["france"]), "u")
    change(ledger, [JAPAN])
    assert ledger.salt(ledger.freeze("s", ["france"]), "u") == before


def test_an_empty_set_leaves_the_users_salt_untouched():
    ledger = Ledger([])
    chosen = ledger.freeze("r", [])
    assert chosen == NOTHING
    assert not chosen
    assert ledger.salt(chosen, None) is None
    assert ledger.salt(chosen, "theirs") == "theirs"


def test_salts_differ_with_the_users_and_with_the_content_and_not_with_the_id():
    a, b = version("a", "1" * 64), version("b", "1" * 64)
    assert salt(None, [a]) == salt(None, [b]) != salt("u", [a])
    assert salt(None, [a]) != salt(None, [version("a", "2" * 64)])
    assert len(salt(None, [a])) == 64
    assert digest_of(a) == "1" * 64


def test_versions_sort_as_ids_do():
    ids = sorted(["a", "a-b", "ab", "a1", "é", "a-"], key=str.encode)
    digest = hashlib.sha256(b"").hexdigest()
    assert sorted((version(id, digest) for id in ids), key=str.encode) == [version(id, digest) for id in ids]


def test_a_set_that_is_retired_is_not_found_again(ledger):
    chosen = ledger.freeze("r", [])
    ledger.release("r")
    change(ledger, unload=["france"])
    ledger.retire([v(FRANCE)])
    with pytest.raises(KeyError):
        ledger.versions(CapsuleSet(chosen.base))


def test_requests_that_come_and_go_leave_nothing_behind_where_nothing_is_ever_changed(ledger):
    for turn in range(1000):
        ledger.freeze(f"r{turn}", [])
        ledger.release(f"r{turn}")
    assert len(ledger._live) + len(ledger._released) <= 2
