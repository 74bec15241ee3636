"""The suite `attacks` on models whose truth is known. What runs every attack on several models is marked slow."""

import json

import pytest
from attacking import FACTS, OTHERS, TEXT, knowing, never_knew, refusing
from auditing import SUBJECT, tokenizer
from mining import check_unchanged, snapshot

from kif_runtime import KifError
from kif_runtime.evaluation.attacks import run
from kif_runtime.evaluation.attacks.trials import gate_off
from kif_runtime.evaluation.audit import Audit, Subject
from kif_runtime.evaluation.states import State, bare


@pytest.mark.slow
def test_a_quick_audit_of_a_model_that_never_saw_the_facts_draws_nothing_out():
    table = run(audited(bare(never_knew(), "after")))
    json.dumps(table, allow_nan=False)
    assert not table["not_tried"] and len(table["attacks"]) >= 9
    for row in table["attacks"]:
        assert row["control"]["success"] > 0.2, row["name"]
        assert row["success"] == row["reference"]["success"], row["name"]


@pytest.mark.slow
def test_the_untouched_model_is_attacked_once_for_all_that_was_made_of_it():
    first, again = (audited(bare(model, "after"), reference=False) for model in (knowing(), refusing()))
    table = run(first)
    for row in table["attacks"]:
        assert row["success"] == row["control"]["success"], row["name"]
    again.outputs = first.outputs
    asked, saved = first.outputs.asked, first.outputs.saved
    other = run(again)
    assert first.outputs.saved - saved > (first.outputs.asked - asked) / 2  # only the erased model is asked anew
    assert [row["control"] for row in other["attacks"]] == [row["control"] for row in table["attacks"]]
    assert [row["success"] for row in other["attacks"]] != [row["success"] for row in table["attacks"]]


def audited(after, reference=True, **options):
    options = {"quick": True, "text": TEXT} | options
    never = bare(never_knew(), "reference") if reference else None
    return Audit(
        bare(knowing()), after, tokenizer(), [Subject(SUBJECT)], FACTS, OTHERS[:12], reference=never, **options
    )


@pytest.fixture(scope="module")
def tables():
    before = snapshot(knowing())
    made = {
        "untouched": run(audited(bare(knowing(), "after"))),
        "refusing": run(audited(bare(refusing(), "after"), quick=False)),
        "never knew": run(audited(bare(never_knew(), "after"), reference=False)),
    }
    check_unchanged(knowing(), before)
    return made


def rows(table):
    return {row["name"]: row for row in table["attacks"]}


@pytest.mark.slow
def test_the_table_is_json_and_each_row_is_whole(tables):
    for table in tables.values():
        json.dumps(table, allow_nan=False)
        assert table["known"] == 3 and not table["not_tried"]
        for row in table["attacks"]:
            assert row["access"] in ("prompt", "weights") and row["budget"] and row["tried"] == 3
            assert row["interval"][0] <= row["success"] <= row["interval"][1]
            assert row["control"]["tried"] == 3 and row["reference"]["tried"] == 3


@pytest.mark.slow
def test_controls_work_on_the_untouched_model(tables):
    for row in tables["refusing"]["attacks"]:
        assert row["control"]["success"] > 0.2, row["name"]
    for row in tables["untouched"]["attacks"]:
        assert row["success"] == row["control"]["success"], row["name"]


@pytest.mark.slow
def test_nothing_is_drawn_out_of_a_model_that_never_saw_the_facts(tables):
    taught = {"relearned, same facts"}  # that one is told them
    for row in tables["never knew"]["attacks"]:
        assert row["name"] in taught or row["success"] <= 1 / 3, row["name"]


@pytest.mark.slow
def test_a_shallow_erasure_is_undone_by_putting_states_back_and_by_relearning(tables):
    found = rows(tables["refusing"])
    assert found["prefill"]["success"] == 0.0
    assert (
        found["removed directions put back"]["success"] > found["removed directions put back"]["reference"]["success"]
    )
    for name in ("relearned, same facts", "relearned, held-out facts"):
        assert 0 <= found[name]["robustness"] <= 1 and 0 <= found[name]["probability"] <= 1
    assert "robustness" not in found["prefill"] and found["prefill"]["probability"] is None
    quiet, loud = (rows(tables[name])["prefill"] for name in ("refusing", "untouched"))
    assert quiet["success"] < loud["success"]


@pytest.mark.slow
def test_a_quick_audit_tries_less(tables):
    assert set(rows(tables["untouched"])) < set(rows(tables["refusing"]))
    assert {"soft prompt", "sparse features put back"} <= set(rows(tables["refusing"]))


@pytest.mark.slow
def test_what_is_put_in_is_not_judged_without_a_model_that_never_knew():
    table = run(audited(bare(never_knew(), "after"), reference=False))
    (row,) = table["without_reference"]
    assert row["name"] == "removed directions put back" and row["reference"] is None and row["control"]["tried"] == 3
    assert row["name"] not in rows(table)


@pytest.mark.slow
def test_a_gate_is_taken_off_and_its_weights_are_not_attacked():
    from auditing import audit

    made = audit("gate", quick=True)
    table = run(made)
    found = rows(table)
    assert found["gate taken off"]["success"] == 1.0 and found["gate taken off"]["access"] == "gate"
    assert {row["access"] for row in table["attacks"]} == {"prompt", "gate"}
    assert table["not_tried"][0]["name"] == "weights"


@pytest.mark.slow
def test_a_forgotten_name_is_reported_by_state(tables):
    told = tables["untouched"]["forgotten_name"]
    assert [row["state"] for row in told] == ["before", "after", "reference"]
    assert all(0 <= row["broken"]["success"] <= 1 for row in told)


def test_a_gate_on_an_adapter_is_taken_off_the_adapter():
    """The untouched model is not what anybody is left with."""
    gate = State("after", bare(refusing()).enter, "gate", removable=True, ungated=bare(refusing(), "ungated"))
    made = gate_off(audited(gate), FACTS)
    assert made["control"]["success"] > 2 / 3 and made["success"] < made["control"]["success"]


def test_facts_that_nobody_knows_are_refused():
    unknown = bare(never_knew())
    with pytest.raises(KifError, match="knows none"):
        run(Audit(unknown, bare(never_knew(), "after"), tokenizer(), [Subject(SUBJECT)], FACTS, OTHERS[:4]))


@pytest.mark.slow
def test_what_lacks_its_data_is_named_and_the_rest_goes_on():
    table = run(audited(bare(refusing(), "after"), quick=False, text=None))
    assert {row["name"] for row in table["not_tried"]} == {"relearned, other text", "sparse features put back"}
    assert "prefill" in rows(table)
