"""What attached capsules do to a model's states and texts, against float64 mathematics and a plain implementation."""

import numpy as np
import pytest
import torch

from kif_hf import attach
from kif_runtime.blocks import decoder_blocks
from tests.families import each_family

ROWS = ([3, 4, 5, 6, 7, 5], [9, 10, 5], [11, 12, 9, 13])
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi", "gpt2", "gpt_neox", "opt", "falcon")
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def by_hand(x, signatures):
    """The operator of one token, as its equation reads, in float64."""
    x = x.astype(np.float64)
    v, fires = x / np.sqrt(np.mean(x * x) + 1e-6), []
    for s in signatures:
        fires.append(float(s.detector.double().numpy() @ v + s.bias.item()) > 0)
    for s, fire in zip(signatures, fires, strict=True):
        if fire:
            u, c = s.basis.double().numpy(), s.target.double().numpy()
            x = x - s.strength.item() * u.T @ (u @ x - c)
    return x, any(fires)


@pytest.mark.parametrize("family", each_family(FAMILIES))
def test_block_output_is_the_equation_in_float64(hf, family):
    model = hf.ready(family)[0]
    five, nine = hf.capsule(model, "five", 5, (1,), strength=0.7), hf.capsule(model, "nine", 9, (1,))
    ids = torch.tensor([[3, 5, 6, 9, 5], [9, 7, 8, 10, 5]])
    stock = hf.states(model, 1, ids).numpy()
    with attach(model, [nine, five]) as kif:
        got = hf.states(model, 1, ids).numpy()
    count = 0
    for index in np.ndindex(2, 5):
        expected, fired = by_hand(stock[index], [five.signatures[0], nine.signatures[0]])
        count += fired
        if fired:
            np.testing.assert_allclose(got[index], expected, rtol=0, atol=2e-6 * np.abs(expected).max())
        else:
            np.testing.assert_array_equal(got[index], stock[index])
    assert count == 5 == sum(kif.fired.values())


@pytest.mark.parametrize("family", each_family(FAMILIES))
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_a_plain_implementation(hf, family, side):
    model, five, nine = hf.ready(family)
    batch = hf.prompts(*ROWS, side=side)
    with torch.no_grad():
        bare = model(**batch).logits
        with hf.plainly(model, [five], [five, nine], []):
            expected = model(**batch).logits
        with attach(model, [five, nine]) as kif, kif.using(["five"], ["nine", "five"], []):
            got = model(**batch).logits
    assert not torch.allclose(bare[0], expected[0], atol=1e-2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(got[2], bare[2])


@pytest.mark.parametrize("family", each_family(FAMILIES))
@pytest.mark.parametrize(
    "how",
    [
        GREEDY,
        GREEDY | {"cache_implementation": "static"},
        GREEDY | {"num_beams": 3, "num_return_sequences": 2},
        {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "static", "beams", "samples"],
)
def test_generate_equals_a_plain_implementation(hf, family, how):
    model, five, nine = hf.ready(family)
    batch = hf.prompts(*ROWS)

    def generate():
        torch.manual_seed(3)
        result = model.generate(**batch, **how, output_logits=True, return_dict_in_generate=True)
        return result.sequences, torch.stack(result.logits)

    bare = generate()
    with hf.plainly(model, [five], [nine], []):
        expected = generate()
    with attach(model, [five, nine]) as kif, kif.using(["five"], ["nine"], []):
        got = generate()
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=2e-5)
    assert not torch.allclose(got[1][0], bare[1][0], atol=0.1)
    assert torch.equal(generate()[1], bare[1])


def test_bfloat16_equals_a_plain_implementation(hf):
    model, five, _ = hf.ready("llama", torch.bfloat16)
    batch = hf.prompts(*ROWS)
    with torch.no_grad():
        with hf.plainly(model, [five]):
            expected = model(**batch).logits
        with attach(model, [five]):
            got = model(**batch).logits
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *each_family(FAMILIES, torch.float32),
        ("llama", torch.bfloat16),
        pytest.param("gemma2", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_nothing_fires_nothing_changes(hf, family, dtype):
    model, five, _ = hf.ready(family, dtype)
    one, batch = torch.tensor([[3, 4, 6, 7]]), hf.prompts([3, 4, 6, 7], [8, 9], [10, 11, 12])
    how = GREEDY | {"suppress_tokens": [5], "output_logits": True, "return_dict_in_generate": True}

    @torch.no_grad()
    def everything():
        texts = model.generate(one, **how).logits + model.generate(**batch, **how).logits
        return [model(one).logits, model(**batch).logits, *texts]

    bare = everything()
    with attach(model, [five]) as kif:
        got = everything()
        assert kif.fired == {"five": 0}
    assert all(torch.equal(a, b) for a, b in zip(got, bare, strict=True))


@pytest.mark.parametrize("family", each_family(FAMILIES))
def test_untouched_rows_of_a_mixed_batch_equal_the_bare_model(hf, family):
    model, five, _ = hf.ready(family)
    batch = hf.prompts([3, 4, 5, 7], [8, 9], [10, 5, 12])
    with torch.no_grad():
        bare = model(**batch).logits
        with attach(model, [five]) as kif:
            got = model(**batch).logits
            assert kif.fired_rows == {"five": [1, 0, 1]}
            with kif.using(["five"], ["five"], []):
                unlisted = model(**batch).logits
    assert torch.equal(got[1], bare[1]) and torch.equal(unlisted[1:], bare[1:])
    assert not torch.equal(got[0], bare[0]) and not torch.equal(got[2], bare[2])


def test_hidden_states_show_what_the_next_block_gets(hf, llama):
    model, five, _ = llama
    ids = torch.tensor([[3, 5, 6]])
    with torch.no_grad():
        model(ids, output_hidden_states=True)  # transformers now has its own hooks on the blocks
        with attach(model, [five]):
            reported = model(ids, output_hidden_states=True).hidden_states
            seen = []
            hook = decoder_blocks(model)[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
            model(ids)
            hook.remove()
    assert torch.equal(reported[2], seen[0])


def test_gradients_flow_and_are_those_of_the_equation(hf, llama):
    model, five, _ = llama
    batch = torch.tensor([[3, 5, 6], [7, 5, 5]])

    def gradient():
        model.zero_grad()
        model(batch, labels=batch).loss.backward()
        return model.model.layers[0].mlp.down_proj.weight.grad.clone()

    bare = gradient()
    with hf.plainly(model, [five]):
        expected = gradient()
    with attach(model, [five]) as kif:
        got = gradient()
        assert kif.fired == {"five": 3}
    model.zero_grad()
    assert not torch.allclose(bare, expected, rtol=1e-2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_inference_mode_and_grad_mode_may_take_turns(hf, llama):
    model, five, _ = llama
    ids = torch.tensor([[3, 5, 6]])
    with torch.inference_mode():
        kif = attach(model, [five])
        first = model(ids).logits.clone()
    with kif:
        second = model(ids).logits
        second.sum().backward()
        model.zero_grad()
        with torch.inference_mode():
            third = model(ids).logits.clone()
        kif.reset()
        model(ids)
        assert kif.fired == {"five": 1}
    assert torch.equal(first, second.detach()) and torch.equal(first, third)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_peft_adapter_may_be_there_before_or_come_after(hf, when):
    peft = pytest.importorskip("peft")
    model = hf.tiny("llama")
    five = hf.capsule(model, "five", 5, (1, 2))
    batch = hf.prompts(*ROWS)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    if when == "before":
        model = peft.get_peft_model(model, config)
        kif = attach(model, [five])
    else:
        kif = attach(model, [five])
        model = peft.get_peft_model(model, config)
    with torch.no_grad():
        got = model(**batch).logits
        text = model.generate(**batch, **GREEDY)
        assert kif.fired["five"] > 0
        kif.detach()
        bare = model(**batch).logits
        with hf.plainly(model, [five]):
            expected, expected_text = model(**batch).logits, model.generate(**batch, **GREEDY)
        with model.disable_adapter():
            assert not torch.allclose(bare, model(**batch).logits)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(text, expected_text) and not torch.allclose(got, bare, atol=1e-3)
