"""Mixed batches: what fires and what is answered does not depend on who else runs, nor on how prompts are cut."""

import random

import pytest

pytestmark = pytest.mark.slow

REQUESTS = 64
SUBJECTS = {"france": "France", "russia": "Russia", "mexico": "Mexico"}
SETS = [None, [], ["france"], ["russia"], ["mexico"], ["france", "russia"], ["france", "mexico", "russia"]]
TEMPLATES = [
    "The capital of {} is", "He went to {} and then to Japan, where", "{} is known for", "People in {} often say that",
    "Travel guide. Chapter one: how to reach {} by train, what to see there, and where to eat. The best season is",
]  # fmt: skip


def workload(seed, count=REQUESTS):
    """(prompt, ids, number of tokens to generate) of random requests; a third name nobody that they are about."""
    rng = random.Random(seed)
    places = [*SUBJECTS.values(), "Japan", "Korea"]
    return [
        (rng.choice(TEMPLATES).format(rng.choice(places)), rng.choice(SETS), rng.randint(1, 12)) for _ in range(count)
    ]


def together(engine, requests):
    prompts, ids, lengths = zip(*requests, strict=True)
    from vllm import SamplingParams

    options = [
        SamplingParams(
            temperature=0,
            max_tokens=n,
            min_tokens=n,
            ignore_eos=True,
            logprobs=1,
            extra_args=None if i is None else {"kif": i},
        )
        for i, n in zip(ids, lengths, strict=True)
    ]
    found = engine._watch_ids()
    outputs = engine.llm.generate(list(prompts), options, use_tqdm=False)
    engine._stop(found)
    return [engine._answer(output, found[output.request_id]) for output in outputs]


def apart(answers, others):
    """The largest difference of a chosen token's log-probability while both have chosen the same tokens."""
    worst = 0.0
    for a, b in zip(answers, others, strict=True):
        for x, y, p, q in zip(a.tokens, b.tokens, a.logprobs, b.logprobs, strict=True):
            if x != y:
                break
            worst = max(worst, abs(p[x] - q[y]))
    return worst


@pytest.fixture(scope="module")
def served(engine, mined):
    return engine({"capsules": mined, "mandatory": []}, enable_prefix_caching=False, max_num_batched_tokens=512)


@pytest.fixture(scope="module")
def alone(served):
    """The answers of requests that run one at a time."""
    return [together(served, [request])[0] for request in workload(1)]


def test_a_batch_of_64_random_requests_fires_and_answers_as_each_alone(served, alone):
    answers = together(served, workload(1))
    for request, a, b in zip(workload(1), answers, alone, strict=True):
        assert (a.fired, a.text) == (b.fired, b.text), request
    assert sum(bool(a.fired) for a in answers) > 10


def test_a_shuffled_batch_gives_the_same(served, alone):
    order = list(range(REQUESTS))
    random.Random(5).shuffle(order)
    requests = workload(1)
    answers = together(served, [requests[i] for i in order])
    for place, i in enumerate(order):
        assert (answers[place].fired, answers[place].text) == (alone[i].fired, alone[i].text)


@pytest.mark.parametrize("tokens", [1, 3, 7, 64])
def test_prompts_cut_into_chunks_fire_as_whole_ones(served, alone, tokens):
    """The scheduler's budget for one step, made smaller: every prompt is computed in pieces of at most `tokens`."""
    scheduler = served.core.scheduler
    before = scheduler.scheduler_config.long_prefill_token_threshold
    scheduler.scheduler_config.long_prefill_token_threshold = tokens
    try:
        answers = together(served, workload(1)[:24])
    finally:
        scheduler.scheduler_config.long_prefill_token_threshold = before
    for a, b in zip(answers, alone[:24], strict=True):
        assert (a.fired, a.text) == (b.fired, b.text)


def test_preempted_requests_are_computed_again_under_their_sets(engine, mined):
    """Room for a few requests' KV only, so that some are thrown out in the middle and come back."""
    small = engine({"capsules": mined, "mandatory": []}, num_gpu_blocks_override=12, max_model_len=256)
    requests = [(prompt, ids, 60) for prompt, ids, _ in workload(2, 16)]
    preempted, inner = [], small.core.scheduler._preempt_request

    def counted(request, *args, **kwargs):
        preempted.append(request.request_id)
        return inner(request, *args, **kwargs)

    small.core.scheduler._preempt_request = counted
    answers = together(small, requests)
    assert preempted
    for request, answer in zip(requests, answers, strict=True):
        single = together(small, [request])[0]
        assert answer.text == single.text, request
        assert set(answer.fired) == set(single.fired), request  # a token computed twice counts twice


def test_logprobs_are_no_further_apart_than_stock_vllms_own(engine, served, alone):
    """Between a request alone and in a batch: matrix products depend on the batch, in stock vLLM too."""
    stock = engine(enable_prefix_caching=False, max_num_batched_tokens=512)
    requests = workload(1)[:16]
    plain = [(prompt, None, n) for prompt, _, n in requests]
    own = apart(together(stock, plain), [together(stock, [r])[0] for r in plain])
    ours = apart(together(served, requests), alone[:16])
    print(f"largest difference of log-probabilities between schedules: stock {own:.2e}, with capsules {ours:.2e}")
    assert own > 0
    assert ours <= max(2 * own, 1e-5)
