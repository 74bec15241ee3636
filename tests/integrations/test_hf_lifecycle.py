"""Attaching leaves no trace on the model, whatever happens; what cannot be suppressed is refused; graphs follow."""

import copy
import dataclasses

import pytest
import torch
from transformers import CompileConfig, StaticCache
from transformers.generation.continuous_batching import ContinuousBatchingManager

from kif_hf import attach
from kif_runtime import Capsule, CapsuleBank, CapsuleError, KifError, ModelError, RequestError

IDS = torch.tensor([[3, 5, 9, 7], [5, 6, 7, 8]])


def trace(model):
    """Everything that attaching might leave behind in any module."""
    return [
        (
            name,
            sorted(vars(m)),
            vars(m).get("forward"),
            [len(v) for k, v in sorted(vars(m).items()) if k.endswith("_hooks")],
        )
        for name, m in model.named_modules()
    ]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def fresh(hf):
    model = hf.tiny("llama")
    return model, hf.capsule(model, "five", 5, (1, 2)), hf.capsule(model, "nine", 9, (2,))


def test_detaching_leaves_the_model_as_it_was(fresh):
    model, five, nine = fresh
    before, bare = trace(model), logits(model)
    with attach(model, [five]):
        assert trace(model) != before
    assert trace(model) == before and torch.equal(logits(model), bare)
    kif = attach(model, [five])
    kif.detach()
    kif.detach()
    assert trace(model) == before
    with pytest.raises(ZeroDivisionError), attach(model, [five]) as kif, kif.using(["five"]):
        1 / 0  # noqa: B018
    assert trace(model) == before
    with attach(model, [nine]) as kif, kif.using([]):
        kif.detach()
        assert trace(model) == before and torch.equal(logits(model), bare)
    with pytest.raises(RequestError, match="detached"), kif:
        pass


def test_a_second_attach_is_refused_and_the_first_stays(fresh):
    model, five, nine = fresh
    before = trace(model)
    with attach(model, [five]) as kif:
        with pytest.raises(RequestError, match="attached already"):
            attach(model, [nine])
        logits(model)
        assert kif.fired == {"five": 2}
    assert trace(model) == before
    with attach(model, [nine]) as kif:
        logits(model)
        assert kif.fired == {"nine": 1}


def test_detaching_below_someone_elses_wrapper(fresh):
    accelerate = pytest.importorskip("accelerate.hooks")
    model, five, _ = fresh
    before, bare, block = trace(model), logits(model), model.model.layers[1]
    kif = attach(model, [five])
    accelerate.add_hook_to_module(block, accelerate.ModelHook())
    suppressed = logits(model)
    assert kif.fired == {"five": 2}
    kif.detach()
    assert torch.equal(logits(model), bare)
    accelerate.remove_hook_from_module(block)
    assert torch.equal(logits(model), bare)
    accelerate.add_hook_to_module(block, accelerate.ModelHook())
    wrapped = trace(model)
    with attach(model, [five]):
        assert torch.equal(logits(model), suppressed)
    assert trace(model) == wrapped != before


def test_a_copy_of_an_attached_model_is_suppressed_by_its_own_weights(fresh):
    model, five, _ = fresh
    bare = logits(model)
    with attach(model, [five]):
        suppressed = logits(model)
        other = copy.deepcopy(model)
    assert torch.equal(logits(other), suppressed) and torch.equal(logits(model), bare)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(other), suppressed)
    with pytest.raises(RequestError, match="attached already"):
        attach(other, [five])


def test_capsules_of_another_model_are_refused(hf, fresh):
    model, five, nine = fresh
    before = trace(model)
    other = hf.tiny("llama", seed=1)
    narrow = hf.tiny("llama", hidden_size=32)
    for wrong, message in (
        (hf.capsule(other, "other", 5, (1,)), "another model"),
        (hf.capsule(narrow, "narrow", 5, (1,)), "width 32"),
        (dataclasses.replace(five, width=32), "expected .32."),
        (dataclasses.replace(five, blocks=12), "12 blocks"),
    ):
        with pytest.raises(CapsuleError, match=message) as caught:
            attach(model, [nine, wrong])
        assert repr(wrong.id) in str(caught.value)
    assert trace(model) == before


def test_bad_arguments_are_refused(fresh):
    model, five, nine = fresh
    before = trace(model)
    same_id = Capsule("five", nine.signatures, nine.model, nine.width, nine.blocks)
    for arguments, options, message in (
        ((five,), {}, "list of capsules"),
        ((["five"],), {}, "not among"),
        (([five, same_id],), {}, "two different capsules"),
        (([five], ["nine"]), {}, "'nine'"),
        (([five, 3],), {}, "got int"),
        (([five, nine],), {"bank": CapsuleBank.for_capsules([five])}, "does not hold the capsule 'nine'"),
        (([five],), {"bank": CapsuleBank.for_capsules([five]), "max_false_fire": 0.1}, "max_false_fire"),
        (([five],), {"max_false_fire": 1e-4}, "calibration"),
    ):
        with pytest.raises(KifError, match=message):
            attach(model, *arguments, **options)
    with pytest.raises(ModelError):
        attach(torch.nn.Linear(2, 2), [five])
    assert trace(model) == before


def test_a_bank_brings_its_own_mandatory_set(fresh):
    model, five, nine = fresh
    bank = CapsuleBank.for_capsules([five, nine], mandatory=["five"])
    with attach(model, [nine], bank=bank) as kif, kif.using([]):
        logits(model)
        assert kif.fired == {"nine": 0, "five": 2}


def test_no_capsules_change_nothing(fresh):
    model, *_ = fresh
    bare = logits(model)
    with attach(model, []) as kif, kif.using([], []):
        assert torch.equal(logits(model), bare)
        assert kif.fired == {} and kif.fired_rows == {}


def test_blocks_on_several_devices_or_offloaded_are_refused(fresh):
    model, five, _ = fresh
    model.model.layers[2].to("meta")
    with pytest.raises(ModelError, match="several devices"):
        attach(model, [five])
    model.model.layers[1].to("meta")
    with pytest.raises(ModelError, match="offloaded"):
        attach(model, [five])
    model.to("meta")
    with pytest.raises(ModelError, match="offloaded"):
        attach(model, [five])


def test_a_model_that_keeps_continuous_batching_is_refused(fresh):
    """Its graphs would be replayed unsuppressed."""
    model, five, _ = fresh
    name = "_cached_continuous_batching_manager"
    assert name in ContinuousBatchingManager.stop.__code__.co_names  # transformers' name for what is kept
    setattr(model, name, object())
    with pytest.raises(RequestError, match="continuous batching"):
        attach(model, [five])
    delattr(model, name)
    attach(model, [five]).detach()


def test_a_skipped_or_repeated_block_is_refused(fresh):
    model, five, _ = fresh
    layers = model.model.layers
    with attach(model, [five]):
        model.model.layers = torch.nn.ModuleList([layers[0], layers[2], layers[3]])
        with pytest.raises(ModelError, match="skipped decoder block 1"):
            logits(model)
        model.model.layers = torch.nn.ModuleList([layers[0], layers[1], layers[1], layers[3]])
        with pytest.raises(ModelError, match="ran twice"):
            logits(model)
        model.model.layers = layers
        with pytest.raises(RequestError, match="outside a forward"):
            layers[1](torch.zeros(1, 2, 64), position_embeddings=None)
        assert logits(model).isfinite().all()


def test_gradient_checkpointing_is_refused(fresh):
    model, five, _ = fresh
    model.gradient_checkpointing_enable()
    model.train()
    with attach(model, [five]):
        with pytest.raises(RequestError, match="checkpointing"):
            model(IDS)
        logits(model)  # nothing is recomputed without gradients
        model.gradient_checkpointing_disable()
        model(IDS, labels=IDS).loss.backward()


def test_calling_the_inner_model_is_suppressed_too(fresh):
    model, five, _ = fresh
    with torch.no_grad():
        bare = model.model(IDS).last_hidden_state
        with attach(model, [five]) as kif:
            assert not torch.equal(model.model(IDS).last_hidden_state, bare)
            assert not torch.equal(model.model.forward(IDS)[0], bare)
            assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, logits(model))
            assert kif.fired == {"five": 8}


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        pytest.param("llama", "eager", marks=pytest.mark.slow),
        *(pytest.param(f, "aot_eager", marks=pytest.mark.slow) for f in ("gpt2", "gemma3_text", "falcon")),
    ],
)
def test_a_graph_compiled_at_any_time_follows_what_is_attached(hf, graphs, family, backend):
    model = hf.tiny(family, num_hidden_layers=2)
    five, nine = hf.capsule(model, "five", 5, (0, 1)), hf.capsule(model, "nine", 9, (1,))
    ids = IDS[:1]
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    bare = logits(model, ids)
    with attach(model, [five]):
        suppressed = logits(model, ids)
    with attach(model, [nine]):
        otherwise = logits(model, ids)
    torch.testing.assert_close(logits(compiled, ids), bare)  # compiled before anything was attached
    with attach(compiled, [five]) as kif:
        torch.testing.assert_close(logits(compiled, ids), suppressed)
        assert kif.fired == {"five": 1}
        with kif.using([]):
            torch.testing.assert_close(logits(compiled, ids), bare)
    torch.testing.assert_close(logits(compiled, ids), bare)
    with attach(model, [nine]) as kif:
        torch.testing.assert_close(logits(compiled, ids), otherwise)
        assert kif.fired == {"nine": 1}


@pytest.mark.slow
def test_a_compiled_model_refuses_a_cache_of_another_set(fresh, graphs):
    model, five, nine = fresh
    compiled = torch.compile(model, backend="aot_eager")
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad(), attach(model, [five, nine]) as kif:
        compiled(IDS, past_key_values=cache)
        compiled(IDS[:, :1], past_key_values=cache)
        with kif.using(["five"]), pytest.raises(RequestError, match="another capsule set"):
            compiled(IDS[:, :1], past_key_values=cache)
        compiled(IDS[:, :1], past_key_values=cache)
        assert kif.fired["five"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [True, False])
def test_generate_compiles_itself_for_a_static_cache(hf, graphs, fullgraph):
    model = hf.tiny("llama")
    five, nine = hf.capsule(model, "five", 5, (1, 2)), hf.capsule(model, "nine", 9, (2,))
    config = CompileConfig(backend="aot_eager", fullgraph=fullgraph, mode=None)
    config._compile_all_devices = True
    batch = hf.prompts([3, 5, 6], [4, 9, 5, 7])
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    static = how | {"cache_implementation": "static", "compile_config": config}
    bare = model.generate(**batch, **how)
    assert torch.equal(model.generate(**batch, **static), bare)
    for lists in ([["five"], ["nine"]], [["nine"], []], [[]]):
        with attach(model, [five, nine]) as kif, kif.using(*lists):
            expected = model.generate(**batch, **how)
            counts = kif.fired_rows
            kif.reset()
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert torch.equal(model.generate(**batch, **static), expected)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
            assert kif.fired_rows == counts
    assert torch.equal(model.generate(**batch, **static), bare)


@pytest.mark.slow
def test_the_inductor_compiles_it(hf, graphs):
    model, five, _ = hf.ready("llama")
    compiled = torch.compile(model, fullgraph=True)
    bare = logits(compiled)
    with attach(model, [five]) as kif:
        torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)
        assert kif.fired == {"five": 4}
    torch.testing.assert_close(logits(compiled), bare)


@pytest.mark.slow
def test_the_real_model(embedded, hf):
    model, tokenizer = embedded
    site, word = 2, tokenizer(" France", add_special_tokens=False).input_ids[0]
    text = tokenizer(
        "Fact: The capital of Germany is Berlin. The river in Spain is long, and the sea is deep.", return_tensors="pt"
    )
    named = tokenizer("Fact: The capital of France is", return_tensors="pt")
    at = named.input_ids[0].tolist().index(word)
    x = torch.cat([hf.states(model, site, text.input_ids)[0], hf.states(model, site, named.input_ids)[0]])
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    is_word = torch.arange(len(x)) == text.input_ids.shape[1] + at
    w = x[is_word][0] - x[~is_word & (torch.arange(len(x)) > 0)].mean(0)
    score = x @ w
    bias = -(score[is_word].min() + score[~is_word].max()) / 2
    assert score[is_word].min() > score[~is_word].max()
    france = hf.make(model, "france", [(site, w.float(), bias.float())], torch.Generator())
    with torch.no_grad():
        bare, bare_named = model(**text).logits, model(**named).logits
        with hf.plainly(model, [france]):
            expected = model(**named).logits
        with attach(model, [france]) as kif:
            assert torch.equal(model(**text).logits, bare) and kif.fired == {"france": 0}
            got = model(**named).logits
            assert kif.fired == {"france": 1}
            kif.reset()
            model.generate(**named, max_new_tokens=4, do_sample=False)
            assert kif.fired["france"] >= 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(got, bare_named, atol=0.1)
