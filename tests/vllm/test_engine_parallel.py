"""Tensor parallel 2: two processes, and both take every decision alike, bit for bit."""

import pytest
from engines import Engine
from test_engine_compiled import PLAIN, SITE, ask, numbers, small  # noqa: F401

from kif_vllm.sets import CapsuleSet, version
from kif_vllm.worker import witness

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(small):  # noqa: F811
    """Its start runs the proof, which compares the ranks."""
    flags = PLAIN | {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    engine = Engine(small[0] / "model", {"capsules": small[0] / "capsules", "mandatory": []}, **flags)
    yield engine
    engine.close()


def test_gates_are_the_same_on_both_ranks_bit_for_bit(small, two):  # noqa: F811
    chosen = CapsuleSet("", (version(small[2].id, small[2].digest),))
    two.core.collective_rpc(witness.start, args=(chosen, 1000))
    answers = ask(two, ["half"])
    first, second = two.core.collective_rpc(witness.stop)
    assert first[SITE]["gates"] == second[SITE]["gates"]
    assert 0 < first[SITE]["fired"] < first[SITE]["tokens"]
    assert first[SITE]["fired"] == sum(a.fired["half"] for a in answers)
    assert first[SITE]["error"] <= first[SITE]["allowed"]


def test_two_ranks_answer_as_one_does(small, two):  # noqa: F811
    alone = Engine(small[0] / "model", {"capsules": small[0] / "capsules", "mandatory": []}, **PLAIN)
    try:
        for ids in (None, ["half"]):
            one, both = ask(alone, ids), ask(two, ids)
            assert [(a.tokens, a.fired) for a in one] == [(a.tokens, a.fired) for a in both]
        assert numbers(ask(alone)) != numbers(ask(alone, ["half"]))
    finally:
        alone.close()


def test_idle_ranks_equal_stock_bit_for_bit(small, two):  # noqa: F811
    flags = PLAIN | {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    stock = Engine(small[0] / "model", None, **flags)
    try:
        assert numbers(ask(two)) == numbers(ask(stock))
    finally:
        stock.close()


def test_changes_reach_both_ranks(two):
    assert "result" in two.command("unload", id="half")
    assert two.command("load", name="half.kif.safetensors")["result"]["generation"] >= 3
    assert two.command("verify")["result"]["ranks"] == 2
