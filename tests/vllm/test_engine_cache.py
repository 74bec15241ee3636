"""Prefix caching is on, and KV written under one capsule set is never read under another, in any order."""

import shutil

import pytest

pytestmark = pytest.mark.slow

BLOCK = 32


@pytest.fixture(scope="module")
def folder(mined, tmp_path_factory):
    folder = tmp_path_factory.mktemp("capsules")
    for path in mined.iterdir():
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def served(engine, folder):
    return engine({"capsules": folder, "mandatory": []}, enable_prefix_caching=True)


@pytest.fixture
def question(served):
    """question(text) -> token ids such that all but the last token fill whole cache blocks: the subject is in them."""
    tokenizer = served.llm.get_tokenizer()

    def build(text, blocks=2):
        asked = tokenizer(text)["input_ids"]
        filler = tokenizer("A list of questions about the world, each with its short answer. " * 20)["input_ids"]
        return filler[: BLOCK * blocks + 1 - len(asked)] + asked

    return build


FRANCE, RUSSIA = "\nThe capital of France is", "\nThe capital of Russia is"
EVERYTHING = 2 * BLOCK


@pytest.fixture(autouse=True)
def empty(served):
    served.llm.reset_prefix_cache()


def one(served, prompt, ids=None, **more):
    return served.ask([prompt], ids, **more)[0]


def check_isolation(served, prompt, first, second):
    """`second` after `first` computes everything anew and answers as it does alone."""
    alone = one(served, prompt, second)
    served.llm.reset_prefix_cache()
    one(served, prompt, first)
    after = one(served, prompt, second)
    assert after.cached == 0, f"{after.cached} tokens of KV made under {first} were read under {second}"
    assert (after.text, after.fired) == (alone.text, alone.fired)
    again = one(served, prompt, second)
    assert again.cached == EVERYTHING
    assert again.text == alone.text


PAIRS = [
    (None, ["france"]), (["france"], None), (["france"], ["russia"]), (["russia"], ["france"]),
    (["france"], ["france", "russia"]), (["france", "russia"], ["france"]), ([], ["france"]), (["france"], []),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=str)
def test_sets_do_not_share_kv(served, question, first, second):
    check_isolation(served, question(FRANCE), first, second)


@pytest.mark.parametrize(("first", "second"), PAIRS[:2], ids=str)
def test_without_the_salt_they_would(served, question, first, second, monkeypatch):
    """The check above sees a leak where there is one."""
    monkeypatch.setattr(served.core.kif.ledger, "salt", lambda chosen, user: user)
    with pytest.raises(AssertionError, match="were read under"):
        check_isolation(served, question(FRANCE), first, second)


def test_without_the_salt_the_fact_would_leak(served, question, monkeypatch):
    prompt = question(FRANCE)
    assert "Paris" in one(served, prompt).text
    assert "Paris" not in one(served, prompt, ["france"]).text
    served.llm.reset_prefix_cache()
    monkeypatch.setattr(served.core.kif.ledger, "salt", lambda chosen, user: user)
    one(served, prompt)
    assert "Paris" in one(served, prompt, ["france"]).text


def test_equal_sets_share_whatever_order_they_are_named_in(served, question):
    prompt = question(FRANCE)
    one(served, prompt, ["france", "russia"])
    assert one(served, prompt, ["russia", "france", "russia"]).cached == EVERYTHING


def test_plain_requests_and_empty_sets_share(served, question):
    one(served, question(FRANCE))
    assert one(served, question(FRANCE), []).cached == EVERYTHING


def test_a_users_own_salt_still_separates(served, question):
    prompt = question(FRANCE)
    one(served, prompt, ["france"], salt="a")
    assert one(served, prompt, ["france"], salt="b").cached == 0
    assert one(served, prompt, ["france"], salt="a").cached == EVERYTHING
    one(served, prompt, salt="a")
    assert one(served, prompt, salt="a").cached == EVERYTHING


def test_a_live_change_of_another_capsule_leaves_cached_kv_valid(served, question):
    prompt = question(FRANCE)
    one(served, prompt, ["france"])
    served.command("unload", id="russia")
    assert one(served, prompt, ["france"]).cached == EVERYTHING
    served.command("load", name="russia.kif.safetensors")
    assert one(served, prompt, ["france"]).cached == EVERYTHING


def test_a_replaced_capsule_reads_nothing_of_its_predecessor_and_undoing_it_finds_that_again(served, question, folder):
    from dataclasses import replace

    from kif_runtime import Capsule

    prompt, path = question(FRANCE), folder / "france.kif.safetensors"
    old = Capsule.load(path)
    before = one(served, prompt, ["france"])
    replace(old, provenance={**old.provenance, "note": "again"}).save(path)
    served.command("load", name=path.name)
    assert one(served, prompt, ["france"]).cached == 0
    old.save(path)
    served.command("load", name=path.name)
    after = one(served, prompt, ["france"])
    assert (after.cached, after.text) == (EVERYTHING, before.text)


def test_the_same_in_another_server_with_a_mandatory_set_has_the_same_keys(served, question):
    """Content alone decides, so that engines can share stored KV."""
    from kif_vllm.engine.ledger import Ledger

    ledger, other = served.core.kif.ledger, Ledger("all")
    other.commit(*other.preview(served.core.kif.held.values()))
    ids = sorted(ledger.current)
    assert ledger.salt(ledger.freeze("x", ids), None) == other.salt(other.freeze("x", []), None)
    ledger.release("x")


def test_versions_leave_the_workers_when_their_last_request_is_gone(served, question):
    one(served, question(FRANCE), ["mexico"])
    served.command("unload", id="mexico")
    served.command("rescan")
    assert not any(name.startswith("mexico+") for name in served.worker.bank.capsules)
    served.command("load", name="mexico.kif.safetensors")
    assert served.command("status")["result"]["requests"] == 0


def test_a_capsule_that_comes_back_while_its_last_request_is_leaving_is_there(served, question):
    """The request that keeps the unloaded version alive ends between the unload and the load."""
    prompt = question(FRANCE)
    held = served.core.kif.ledger.freeze("still running", ["france"])
    served.command("unload", id="france")
    assert any(name in served.worker.bank.capsules for name in held.extra)
    served.core.kif.ledger.release("still running")
    served.command("load", name="france.kif.safetensors")
    assert "Paris" not in one(served, prompt, ["france"]).text
