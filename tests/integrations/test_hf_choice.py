"""Which capsules apply to which row, what is counted, and which caches are accepted."""

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs

from kif_hf import attach
from kif_runtime import CapsuleBank, KifError, RequestError

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def logits(model, *rows):
    with torch.no_grad():
        return model(torch.tensor(rows)).logits


def test_using_replaces_the_default_set_and_nests(llama):
    model, five, nine = llama
    row = [3, 5, 9, 7]
    bare = logits(model, row)
    with attach(model, [five, nine]) as kif:
        both = logits(model, row)
        with kif.using(["five"]):
            only = logits(model, row)
            with kif.using([]):
                assert torch.equal(logits(model, row), bare)
            assert torch.equal(logits(model, row), only)
            with pytest.raises(ZeroDivisionError), kif.using(["nine"]):
                1 / 0  # noqa: B018
            assert torch.equal(logits(model, row), only)
        assert torch.equal(logits(model, row), both)
    distinct = [bare, both, only]
    assert not any(torch.equal(a, b) for i, a in enumerate(distinct) for b in distinct[:i])


def test_a_block_that_ends_out_of_turn_takes_only_its_own_set_away(llama):
    """As that of a generator does, which was thrown away before its end."""
    model, five, nine = llama
    row = [3, 5, 9, 7]
    with attach(model, [five, nine], mandatory=[nine]) as kif:
        both = logits(model, row)
        for names in ([], ["five"]):
            outer, inner = kif.using(names), kif.using(["nine"])
            outer.__enter__()
            inner.__enter__()
            only = logits(model, row)
            outer.__exit__(None, None, None)
            assert torch.equal(logits(model, row), only)
            inner.__exit__(None, None, None)
            assert torch.equal(logits(model, row), both)
    assert not torch.equal(both, only)


def test_a_block_beside_one_of_another_thread_or_task_is_refused(llama):
    model, five, nine = llama

    def enter(kif):
        with kif.using(["five"]):
            return logits(model, [3, 5])

    async def as_task(kif):
        return enter(kif)

    async def beside(kif):
        with kif.using([]):
            await asyncio.create_task(as_task(kif))

    with attach(model, [five, nine]) as kif, ThreadPoolExecutor(1) as other:
        suppressed = logits(model, [3, 5])
        for around in (kif.using([]), kif.using(["nine"])):
            with around, pytest.raises(RequestError, match="another thread or asyncio task"):
                other.submit(enter, kif).result()
        with pytest.raises(RequestError, match="another thread or asyncio task"):
            asyncio.run(beside(kif))
        assert torch.equal(logits(model, [3, 5]), suppressed)
        for around in (nullcontext(), kif.using(["five"])):  # a streaming generate runs in a thread of its own
            with around:
                assert torch.equal(other.submit(logits, model, [3, 5]).result(), suppressed)
        assert torch.equal(other.submit(enter, kif).result(), suppressed)


def test_mandatory_capsules_apply_whatever_is_named(llama):
    model, five, nine = llama
    with attach(model, [nine], mandatory=[five]) as kif:
        logits(model, [3, 5, 9])
        assert kif.fired == {"nine": 1, "five": 1}
        with kif.using([], ["nine"]):
            logits(model, [3, 5, 9], [3, 5, 9])
        assert kif.fired == {"nine": 2, "five": 3}
        assert kif.fired_rows == {"nine": [0, 1], "five": [1, 1]}
    with attach(model, [five, nine], mandatory=["five"]) as kif, kif.using([]):
        logits(model, [3, 5, 9])
        assert kif.fired == {"nine": 0, "five": 1}


def test_rows_are_repeated_for_beams_and_samples(hf, llama):
    model, five, nine = llama
    batch = hf.prompts([3, 5, 9], [5, 9, 4, 4])
    for how in ({"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}):
        with attach(model, [five, nine]) as kif, kif.using(["five"], ["nine"]):
            model.generate(**batch, max_new_tokens=1, **how)
            assert kif.fired_rows == {"five": [3, 0], "nine": [0, 3]}


@pytest.mark.parametrize("lists", [(["five"], []), ([], [], ["nine"], []), ([],) * 6], ids=len)
def test_a_number_of_lists_that_does_not_fit_the_batch_is_refused(llama, lists):
    model, five, nine = llama
    with attach(model, [five, nine]) as kif, kif.using(*lists), pytest.raises(RequestError, match="3 rows"):
        logits(model, [3, 4], [5, 6], [7, 8])


@pytest.mark.parametrize(
    ("lists", "message"),
    [((["gone"],), "no capsule 'gone'"), ((), "needs a list"), (("five",), "lists of"), (([5],), "lists of")],
)
def test_using_refuses_what_it_cannot_apply(llama, lists, message):
    model, five, _ = llama
    with attach(model, [five]) as kif:
        before = logits(model, [3, 5])
        with pytest.raises(RequestError, match=message):
            kif.using(*lists)
        assert torch.equal(logits(model, [3, 5]), before)
    with pytest.raises(RequestError, match="detached"), kif.using(["five"]):
        pass


def test_many_sets_in_turn_do_not_fill_the_bank(llama):
    model, five, nine = llama
    bank = CapsuleBank.for_capsules([five, nine], max_sets=3)
    for _ in range(3):
        with attach(model, [five, nine], bank=bank) as kif:
            for lists in ([["five"]], [["nine"], []], [["five"], ["nine"]]) * 3:
                with kif.using(*lists):
                    logits(model, [3, 5], [9, 5])
            with pytest.raises(KifError, match="sets"), kif.using(["five"], ["nine"], []):
                pass
    assert bank.row([]) == 0  # everything was given back


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_each_token_counts_once_and_padding_never(hf, side, family, implementation):
    """The padding id is the one that the capsule fires on."""
    model = hf.tiny(family, attn_implementation=implementation)
    pad = hf.capsule(model, "pad", hf.PAD, (1, 2))
    batch = hf.prompts([3, 4, 6, 7, 8, 9, 10, hf.PAD], [hf.PAD, 10, hf.PAD], [11, 12, 13], side=side)
    with attach(model, [pad]) as kif:
        with torch.no_grad():
            model(**batch)
        assert kif.fired == {"pad": 3} and kif.fired_rows == {"pad": [1, 2, 0]}
        with torch.no_grad():
            model(**batch)
        assert kif.fired == {"pad": 6} and kif.fired_rows == {"pad": [2, 4, 0]}
        kif.reset()
        assert kif.fired == {"pad": 0} and kif.fired_rows == {"pad": [0, 0, 0]}
        for extra in ({}, {"cache_implementation": "static"}):
            kif.reset()
            model.generate(**batch, **GREEDY, **extra, suppress_tokens=[hf.PAD])
            assert kif.fired_rows == {"pad": [1, 2, 0]}
        model(torch.tensor([[hf.PAD, 3]]))
        assert kif.fired_rows == {"pad": [1]} and kif.fired == {"pad": 4}


def test_what_is_fed_to_finished_rows_does_not_count(hf, llama):
    model = hf.tiny("llama")
    pad = hf.capsule(model, "pad", hf.PAD, (1,))
    rows = [3, 4, 6], [7, 8, 10]
    texts = [model.generate(torch.tensor([r]), **GREEDY)[0, 3:].tolist() for r in rows]
    model.generation_config.eos_token_id = end = texts[0][0]
    assert end not in texts[1] and hf.PAD not in texts[1]
    with attach(model, [pad]) as kif:
        out = model.generate(torch.tensor(rows), max_new_tokens=4, do_sample=False)
        assert out[0, 4:].tolist() == [hf.PAD] * 3
        assert kif.fired == {"pad": 0}


def test_a_continued_static_cache_counts_its_new_tokens(hf):
    model = hf.tiny("llama")
    pad = hf.capsule(model, "pad", hf.PAD, (1,))
    batch = hf.prompts([3, 4, 6, 7], [8, 9], side="left")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with attach(model, [pad]) as kif:
        out = model.generate(**batch, **GREEDY, past_key_values=cache)
        more = torch.cat([out, torch.tensor([[5, hf.PAD, hf.PAD], [hf.PAD, 6, 7]])], 1)
        mask = (torch.arange(more.shape[1]) >= torch.tensor([[0], [2]])).long()
        model.generate(more, attention_mask=mask, **GREEDY, past_key_values=cache)
        assert kif.fired_rows == {"pad": [2, 1]}


def caches(model):
    return {"dynamic": DynamicCache(config=model.config), "static": StaticCache(config=model.config, max_cache_len=24)}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "made by the model"])
def test_a_cache_serves_only_the_set_that_it_was_made_under(hf, family, kind):
    model, five, nine = hf.ready(family)
    first, second = torch.tensor([[3, 5, 9]]), torch.tensor([[4, 9, 5]])

    def begin():
        return model(first, past_key_values=caches(model).get(kind), use_cache=True).past_key_values

    def go_on(cache):
        return model(second, past_key_values=copy.deepcopy(cache), use_cache=True).logits

    with torch.no_grad():
        stock = begin()
        with attach(model, [five, nine]) as kif:
            whole = model(torch.cat([first, second], 1)).logits[:, 3:]
            made = begin()
            torch.testing.assert_close(go_on(made), whole, rtol=1e-4, atol=1e-4)
            with kif.using(["nine", "five"]):  # the same set
                torch.testing.assert_close(go_on(made), whole, rtol=1e-4, atol=1e-4)
            kif.reset()
            for names in ([], ["five"]):
                with kif.using(names), pytest.raises(RequestError, match="another capsule set"):
                    go_on(made)
            with pytest.raises(RequestError, match="before they were attached"):
                go_on(stock)
            assert kif.fired == {"five": 0, "nine": 0}  # refused before anything was computed
        bare_length = made.get_seq_length()
        go_on(made)
        with attach(model, [nine, five]):  # the same capsules again
            torch.testing.assert_close(go_on(made), whole, rtol=1e-4, atol=1e-4)
        model(second, past_key_values=made)
        with attach(model, [five, nine]), pytest.raises(RequestError, match="added by a forward without"):
            go_on(made)
        assert int(made.get_seq_length()) == int(bare_length) + 3 or kind == "static"


def test_caches_stay_with_their_rows_and_through_changes(llama):
    model, five, nine = llama
    rows = torch.tensor([[3, 5, 9], [3, 5, 9]])
    with torch.no_grad(), attach(model, [five, nine]) as kif:
        with kif.using(["five"], ["nine"]):
            made = model(rows, use_cache=True).past_key_values
            model(rows[:, :1], past_key_values=copy.deepcopy(made))
        with kif.using(["nine"], ["five"]), pytest.raises(RequestError):
            model(rows, past_key_values=copy.deepcopy(made))
        with kif.using(["five"]):
            with pytest.raises(RequestError):
                model(rows, past_key_values=made)
            made.crop(-made.get_seq_length())  # emptied, so it may serve any set
            model(rows, past_key_values=made)
            made.crop(-2)
            made.batch_repeat_interleave(2)
            model(rows.repeat(2, 1)[:, 2:], past_key_values=made)
        with pytest.raises(RequestError, match="cannot check"):
            model(rows, past_key_values=((torch.zeros(1),),))


def test_the_pages_of_continuous_batching_are_refused(llama):
    model, five, _ = llama
    assert "cache" in PagedAttentionArgs.__annotations__  # transformers' name for what it hands to the forward
    with attach(model, [five]) as kif, torch.no_grad():
        with pytest.raises(RequestError, match=r"call generate\(\)"):
            model(torch.tensor([[3, 5]]), cache=object(), use_cache=False)
        assert kif.fired == {"five": 0}


def test_several_turns_with_one_cache(hf, llama):
    model, five, nine = llama
    cache, text = DynamicCache(config=model.config), torch.tensor([[3, 5, 4]])
    with attach(model, [five, nine]):
        for token in (9, 5):
            text = torch.cat([model.generate(text, **GREEDY, past_key_values=cache), torch.tensor([[token]])], 1)
        anew = torch.tensor([[3, 5, 4]])
        for token in (9, 5):
            anew = torch.cat([model.generate(anew, **GREEDY), torch.tensor([[token]])], 1)
    assert torch.equal(text, anew)


def test_a_cache_left_by_a_failed_forward_is_refused(llama):
    model, five, _ = llama
    cache = DynamicCache(config=model.config)

    def fail(module, args):
        raise MemoryError

    with torch.no_grad(), attach(model, [five]):
        hook = model.model.layers[3].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(torch.tensor([[3, 5]]), past_key_values=cache)
        hook.remove()
        with pytest.raises(RequestError, match="failed"):
            model(torch.tensor([[3, 5]]), past_key_values=cache)
        assert model(torch.tensor([[3, 5]])).logits.isfinite().all()


def test_two_threads_at_once_are_refused(llama):
    model, five, _ = llama
    inside, leave, caught = threading.Event(), threading.Event(), []

    def wait(module, args):
        inside.set()
        leave.wait(5)

    def other():
        try:
            logits(model, [3, 5])
        except RequestError as error:
            caught.append(error)

    with attach(model, [five]) as kif:
        hook = model.model.layers[0].register_forward_pre_hook(wait)
        slow = threading.Thread(target=logits, args=(model, [3, 5]))
        slow.start()
        inside.wait(5)
        other()
        leave.set()
        slow.join()
        hook.remove()
        assert len(caught) == 1 and kif.fired == {"five": 1}
