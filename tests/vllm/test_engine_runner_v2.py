"""The V2 runner's listener, with the real classes of vLLM that a CPU can make; the runner itself needs a GPU."""

from types import SimpleNamespace

import pytest
import torch
from test_plugin_worker import CAPSULES, SITE, frozen, room, v

from capsules import D
from kif_vllm.sets import KEY, base_of
from kif_vllm.worker.install import serve
from kif_vllm.worker.runner_v2 import Listener, attach
from kif_vllm.worker.site import Site
from kif_vllm.worker.suppression import Change, Suppression

pytestmark = pytest.mark.slow


class Inner:
    """Stands for the runner's ModelState: remembers what reaches it."""

    def __init__(self):
        self.calls = []
        self.max_num_reqs = 8

    def add_request(self, req_index, new_req_data):
        self.calls.append(("add", req_index))

    def remove_request(self, req_id):
        self.calls.append(("remove", req_id))

    def prepare_inputs(self, input_batch, req_states):
        return {"positions": 1}


@pytest.fixture
def suppression():
    made = Suppression(room(), torch.device("cpu"))
    made.sites[SITE] = Site(SITE, made.bank.site(SITE), made.batch)
    base = (v("a"), v("b"))
    made.apply(Change(tuple(CAPSULES.values()), ((base_of(base), base),)))
    return made


@pytest.fixture
def listener(suppression):
    runner = SimpleNamespace(model_state=Inner())
    attach(runner, suppression)
    return runner.model_state


def new_request(id, ids):
    from vllm import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData

    params = SamplingParams(extra_args={KEY: frozen(ids)} if ids is not None else None)
    return NewRequestData(
        req_id=id, prompt_token_ids=[1], mm_features=[], sampling_params=params, pooling_params=None, block_ids=([],),
        num_computed_tokens=0, lora_request=None,
    )  # fmt: skip


def batch(ids, lengths, max_tokens=64):
    """vLLM's own InputBatch of these requests."""
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    made = InputBatch.make_dummy(len(ids), sum(lengths), InputBuffers(8, max_tokens, torch.device("cpu")))
    made.req_ids = list(ids)
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    made.query_start_loc[: len(starts)] = starts
    return made


def test_tokens_get_the_rows_of_their_requests_and_padding_none(listener, suppression):
    for index, (id, ids) in enumerate([("r", ("a", "b")), ("s", ()), ("t", ("c",))]):
        listener.add_request(index, new_request(id, ids))
    assert listener.prepare_inputs(batch(["t", "r", "s"], [2, 3, 4]), None) == {"positions": 1}
    rows = suppression.batch.rows.tolist()
    assert rows[:9] == [rows[0]] * 2 + [rows[2]] * 3 + [-1] * 4
    assert -1 not in (rows[0], rows[2]) and rows[0] != rows[2]
    assert set(rows[9:]) == {-1}


def test_the_devices_own_starts_count_where_speculation_is_adaptive(listener, suppression):
    """The host knows at most 9 tokens; the device has given the first request 1 and the second 3."""
    for index, id in enumerate(["r", "s"]):
        listener.add_request(index, new_request(id, ("a", "b") if id == "r" else ("c",)))
    made = batch(["r", "s"], [3, 6])
    made.query_start_loc[:3] = torch.tensor([0, 1, 4], dtype=torch.int32)
    listener.prepare_inputs(made, None)
    rows = suppression.batch.rows.tolist()
    assert rows[0] != rows[1] == rows[2] == rows[3] != -1
    assert set(rows[4:]) == {-1}


def test_a_dummy_batch_belongs_to_nobody(listener, suppression):
    listener.add_request(0, new_request("r", ("a", "b")))
    listener.prepare_inputs(batch(["r"], [5]), None)
    listener.prepare_inputs(batch(["req_0_x", "req_1_y"], [3, 3]), None)
    assert set(suppression.batch.rows.tolist()) == {-1}
    x = torch.randn(6, D)
    out = x.clone()
    suppression.sites[SITE].suppress(out)
    assert torch.equal(out, x)


def test_a_request_that_was_not_frozen_stops_the_batch(listener):
    listener.add_request(0, new_request("r", None))
    with pytest.raises(Exception, match="frozen"):
        listener.prepare_inputs(batch(["r"], [5]), None)


def warm_up(listener, suppression):
    """vLLM's own, with a runner that only tells the listener; the rows of its tokens, step by step."""
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

    seen = []

    def execute(output):
        for index, new in enumerate(output.scheduled_new_reqs):
            listener.add_request(index, new)
        if output.num_scheduled_tokens:
            listener.prepare_inputs(batch(*zip(*output.num_scheduled_tokens.items(), strict=True)), None)
            seen.append(set(suppression.batch.rows.tolist()))
        for id in output.finished_req_ids:
            listener.remove_request(id)

    runner = SimpleNamespace(
        is_pooling_model=False, max_num_reqs=8, num_speculative_steps=0, max_model_len=64, model_state=listener,
        kv_cache_config=SimpleNamespace(kv_cache_groups=[], num_blocks=8),
        vllm_config=SimpleNamespace(num_lookahead_tokens=0),
        kv_connector=SimpleNamespace(set_disabled=lambda off: None),
    )  # fmt: skip
    assert run_mixed_prefill_decode_warmup(runner, execute, lambda output: None, 16)
    return seen


def test_requests_of_vllms_warm_up_have_no_set(listener, suppression):
    """It sends requests of its own, in batches like any other, before the first is served."""
    suppression.warming = True
    assert warm_up(listener, suppression) == [{-1}, {-1}]
    assert suppression.figures()["tokens_seen"] == 0


def test_once_the_set_up_is_over_such_requests_stop_the_step(listener, suppression):
    suppression.warming = True
    serve(SimpleNamespace(model_runner=SimpleNamespace(kif=suppression)))
    with pytest.raises(Exception, match="frozen"):
        warm_up(listener, suppression)


def test_a_batch_with_a_stranger_in_it_is_refused(listener):
    listener.add_request(0, new_request("r", ("a", "b")))
    with pytest.raises(RuntimeError, match="mixes"):
        listener.prepare_inputs(batch(["r", "stranger"], [5, 5]), None)


def test_preempted_requests_leave_and_come_back_and_everything_else_is_passed_on(listener):
    listener.add_request(3, new_request("r", ("a", "b")))
    listener.remove_request("r")
    listener.add_request(4, new_request("r", ("a", "b")))
    listener.prepare_inputs(batch(["r"], [2]), None)
    assert listener._inner.calls == [("add", 3), ("remove", "r"), ("add", 4)]
    assert listener.max_num_reqs == 8


def test_the_listener_overrides_what_vllms_state_has_with_the_same_parameters():
    import inspect

    from vllm.v1.worker.gpu.model_states.interface import ModelState

    for name in ("add_request", "remove_request", "prepare_inputs"):
        ours, theirs = (list(inspect.signature(getattr(owner, name)).parameters) for owner in (Listener, ModelState))
        assert ours == theirs
