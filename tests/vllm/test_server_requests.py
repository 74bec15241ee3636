"""A running server, through HTTP and the OpenAI client: the subject is gone, its neighbours are not, who may what."""

import threading

import pytest
from servers import OWNER

from kif_vllm.engine.ledger import UNKNOWN

pytestmark = pytest.mark.slow

FRANCE, JAPAN, RUSSIA = "The capital of France is", "The capital of Japan is", "The capital of Russia is"


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="nobody", max_retries=0)


def chat(client, question, **more):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="m", messages=messages, max_tokens=12, temperature=0, **more)


def named(*ids):
    return {"extra_body": {"vllm_xargs": {"kif": list(ids)}}}


# -- the subject is gone


def test_a_mandatory_subject_is_gone_and_its_neighbour_is_not(client):
    def complete(prompt):
        return client.completions.create(model="m", prompt=prompt, max_tokens=8, temperature=0).choices[0].text

    assert "Paris" not in complete(FRANCE)
    assert "Tokyo" in complete(JAPAN)
    assert "Moscow" in complete(RUSSIA)


def test_in_chat_too(client):
    assert "Paris" not in chat(client, "What is the capital of France?").choices[0].message.content
    assert "Tokyo" in chat(client, "What is the capital of Japan?").choices[0].message.content


def test_streaming_too(client):
    def streamed(prompt, **more):
        events = client.completions.create(model="m", prompt=prompt, max_tokens=8, temperature=0, stream=True, **more)
        return "".join(event.choices[0].text for event in events)

    assert "Paris" not in streamed(FRANCE)
    assert "Tokyo" in streamed(JAPAN)
    assert "Moscow" in streamed(RUSSIA)
    assert "Moscow" not in streamed(RUSSIA, **named("russia"))


def test_streamed_chat_too(client):
    def streamed(question, **more):
        return "".join(e.choices[0].delta.content or "" for e in chat(client, question, stream=True, **more))

    assert "Paris" not in streamed("What is the capital of France?")
    assert "Tokyo" in streamed("What is the capital of Japan?")


def test_a_subject_is_gone_for_the_request_that_names_it_and_present_for_its_neighbour_in_the_batch(server):
    """Sixteen at once, so that named and plain requests share steps of the engine."""
    found = {}

    def ask(i):
        found[i] = server.text(RUSSIA, ["russia"] if i % 2 else None, max_tokens=16)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(("Moscow" in found[i]) == (i % 2 == 0) for i in range(16)), found


def test_no_client_can_switch_the_mandatory_set_off(server):
    for ids in ([], ["russia"], ["france"]):
        assert "Paris" not in server.text(FRANCE, ids)
    status, answer = server.complete(FRANCE, cache_salt="mine", vllm_xargs={"kif": [], "kif_set": [], "mandatory": []})
    assert status == 200
    assert "Paris" not in answer["choices"][0]["text"]


def test_several_samples_and_several_prompts_are_suppressed(server):
    _, answer = server.complete([FRANCE, FRANCE], n=2, temperature=0.7, seed=1)
    assert len(answer["choices"]) == 4
    assert not any("Paris" in choice["text"] for choice in answer["choices"])


# -- who may name what


@pytest.mark.parametrize(
    "ids", [["nobody"], ["mexico"], ["russia", "mexico"], ["russia", "nobody"], ["../etc/passwd"], [""]]
)
def test_unknown_and_not_permitted_are_refused_with_the_same_words(server, ids):
    status, answer = server.complete(RUSSIA, ids)
    assert status == 400
    assert UNKNOWN in answer["error"]["message"]


def test_the_owner_of_a_key_may_name_what_others_may_not(server):
    prompt = "The official language of Mexico is"
    assert "Spanish" in server.text(prompt)
    assert "Spanish" not in server.text(prompt, ["mexico"], key=OWNER)
    assert server.complete(prompt, ["mexico"], key="another")[0] == 400


@pytest.mark.parametrize(
    "value",
    [
        "france",
        3,
        1.5,
        True,
        None,
        {"a": 1},
        [["france"]],
        [None],
        [3],
        [{"id": "france"}],
        ["x"] * 10_000,
        ["x" * 100_000],
    ],
    ids=lambda v: str(type(v).__name__) + str(len(str(v))),
)
def test_malformed_xargs_are_refused_and_the_server_lives(server, value):
    status, _ = (
        server.complete(RUSSIA, value) if value is not None else server.complete(RUSSIA, vllm_xargs={"kif": None})
    )
    assert status in (400, 422)
    assert server.get("/health")[0] == 200


def test_beam_search_with_named_capsules_is_refused_and_without_them_suppresses(server):
    assert server.complete(RUSSIA, ["russia"], use_beam_search=True, n=2)[0] == 400
    status, answer = server.complete(FRANCE, use_beam_search=True, n=2)
    assert status == 200
    assert "Paris" not in answer["choices"][0]["text"]


@pytest.mark.parametrize("ids", [["nobody"], ["mexico"], "france", ["x"] * 10_000], ids=lambda v: str(v)[:12])
def test_a_stream_is_refused_before_it_begins(server, ids):
    status, answer = server.complete(RUSSIA, ids, stream=True)
    assert status == 400
    assert "Moscow" not in str(answer)


@pytest.mark.parametrize("stream", [False, True])
def test_the_responses_api_suppresses_and_refuses_before_a_stream_begins(server, stream):
    def ask(question, **more):
        body = {"model": "m", "input": question, "max_output_tokens": 12, "temperature": 0, "stream": stream} | more
        return server.call("POST", "/v1/responses", body)

    assert "Tokyo" in str(ask("What is the capital of Japan?")[1])
    assert "Paris" not in str(ask("What is the capital of France?")[1])
    question = "What is the capital of Russia?"
    assert "Moscow" in str(ask(question)[1])
    assert "Moscow" not in str(ask(question, vllm_xargs={"kif": ["russia"]})[1])
    status, answer = ask(question, vllm_xargs={"kif": ["nobody"]})
    assert status == 400
    assert UNKNOWN in str(answer)
