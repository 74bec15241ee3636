"""Exact no-op and parity: where nothing fires vLLM computes what stock vLLM computes, elsewhere what HF computes."""

import pytest
import torch

from kif_runtime.errors import RequestError

pytestmark = pytest.mark.slow

PLAIN = [
    "The capital of Japan is",
    "Water boils at a temperature of",
    "The author of Hamlet is",
    "def fibonacci(n):",
    "In the beginning there was",
    "The largest planet in the solar system is",
]
COUNTRIES = ("France", "Russia", "Mexico")
SUBJECT = [
    *(f"The {what} of {name} is" for name in COUNTRIES for what in ("capital", "official language", "currency")),
    *(f"{name} is a country in" for name in COUNTRIES),
    "My friend moved from France to",
    "He said that Russia and France are",
    "A traveller in Mexico should",
]
PROMPTS = [*SUBJECT, *PLAIN[:5]]
# Largest difference of a residual between the two frameworks, in units of the largest entry of its token.
RESIDUAL_BOUND = 2e-4


@pytest.fixture(scope="module")
def stock(engine):
    return engine()


@pytest.fixture(scope="module")
def served(engine, mined):
    """All capsules may be named, none is mandatory."""
    return engine({"capsules": mined, "mandatory": []})


@pytest.fixture(scope="module")
def hf(embedded, mined):
    """run(prompt, ids) -> (text, fired) with Hugging Face and the same capsules."""
    from kif_hf import attach
    from kif_runtime import Capsule

    model, tokenizer = embedded
    capsules = [Capsule.load(path) for path in sorted(mined.iterdir())]

    def run(prompt, ids):
        inputs = tokenizer(prompt, return_tensors="pt")
        with attach(model, capsules) as kif, kif.using(ids):
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]), {k: n for k, n in kif.fired.items() if n}

    return run


ALL = ["france", "mexico", "russia"]


@pytest.mark.parametrize("ids", [None, [], ALL])
def test_where_nothing_fires_every_number_is_that_of_stock_vllm(stock, served, ids):
    want = stock.ask(PLAIN, prompt_logprobs=5, max_tokens=16)
    got = served.ask(PLAIN, ids, prompt_logprobs=5, max_tokens=16)
    assert all(answer.fired == {} for answer in got)
    for a, b in zip(want, got, strict=True):
        assert (a.tokens, a.logprobs, a.prompt_logprobs) == (b.tokens, b.logprobs, b.prompt_logprobs)


def test_neighbours_in_the_batch_of_a_suppressed_request_keep_every_bit(stock, served):
    prompts = [SUBJECT[0], *PLAIN, SUBJECT[3]]
    want = stock.ask(prompts, prompt_logprobs=5)
    got = served.ask(prompts, [["france"], *([None] * len(PLAIN)), ["russia"]], prompt_logprobs=5)
    assert got[0].fired and got[-1].fired
    assert want[0].text != got[0].text
    for a, b in list(zip(want, got, strict=True))[1:-1]:
        assert (a.tokens, a.logprobs, a.prompt_logprobs) == (b.tokens, b.logprobs, b.prompt_logprobs)


def test_gates_and_greedy_texts_are_those_of_hugging_face(served, hf):
    assert len(PROMPTS) == 20
    fired = 0
    for prompt in PROMPTS:
        answer = served.ask([prompt], ALL)[0]
        text, counts = hf(prompt, ALL)
        assert (answer.text, answer.fired) == (text, counts), prompt
        fired += bool(counts)
    assert fired >= 12


def test_residuals_are_those_of_hugging_face(served, embedded):
    """At every site, before suppression: the sum that vLLM forms is the block's output."""
    model, tokenizer = embedded
    prompt = SUBJECT[13]
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    for site in served.worker.sites.values():
        site.witness = []
    served.ask([prompt], salt="fresh", max_tokens=1)
    for block, site in served.worker.sites.items():
        before, after, rows = site.witness[0]
        site.witness = None
        want = states[block + 1][0]
        error = (before - want).abs().amax(-1) / want.abs().amax(-1)
        assert float(error.max()) < RESIDUAL_BOUND, block
        assert torch.equal(before, after)
        assert rows.tolist() == [-1] * len(want)


def test_the_proof_runs_in_a_working_engine_and_leaves_no_trace(served):
    before = served.ask(PLAIN[:2])
    result = served.command("verify")["result"]
    assert set(result["sites"]) == set(served.worker.sites)
    assert all(site["fired"] == site["tokens"] > 40 for site in result["sites"].values())
    assert [a.tokens for a in served.ask(PLAIN[:2])] == [a.tokens for a in before]
    assert not any("kif-proof" in name for name in served.worker.bank.capsules)


def test_once_the_engine_is_up_a_request_without_a_frozen_set_stops_the_step(served, monkeypatch):
    """Until then vLLM's warm-up sends such requests; were that never over, the proof would fail."""
    with pytest.raises(RequestError, match="frozen"):
        served.worker.begin(["r"], [None], torch.tensor([0, 4], dtype=torch.int32), 4)
    monkeypatch.setattr(served.worker, "warming", True)
    assert served.command("verify")["kind"] == "ProofError"


@pytest.mark.parametrize("fault", ["gate shut", "wrong plane", "row lost"])
def test_the_proof_fails_where_suppression_does_not_work(served, monkeypatch, fault):
    from kif_vllm.worker import site as module

    def broken(normed, residual, rows, *rest, **more):
        if fault == "gate shut":
            return
        if fault == "row lost":
            rows = torch.full_like(rows, -1)
        real(normed, residual, rows, *rest, **more)
        if fault == "wrong plane":
            residual[rows >= 0] += 1e-2

    real = module.suppress_normed_
    monkeypatch.setattr(module, "suppress_normed_", broken)
    answer = served.command("verify")
    assert answer["kind"] == "ProofError"
    monkeypatch.undo()
    assert "result" in served.command("verify")
