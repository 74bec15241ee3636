"""Capsules beside what else a server does: LoRA adapters in one batch, and n-gram speculation."""

import pytest
import torch

pytestmark = pytest.mark.slow

FRANCE, JAPAN = "The capital of France is", "The capital of Japan is"


@pytest.fixture(scope="module")
def adapter(embedded, tmp_path_factory):
    """A LoRA adapter with random weights, small enough that answers stay answers."""
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, lora_alpha=1)
    model = get_peft_model(deepcopy(embedded[0]), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data *= 0.05
    model.save_pretrained(folder)
    return folder


def test_adapter_and_capsule_in_one_batch_each_do_what_they_do_alone(engine, mined, adapter):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    flags = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    stock, served = engine(**flags), engine({"capsules": mined, "mandatory": []}, **flags)
    lora = LoRARequest("task", 1, str(adapter))

    def run(server, requests):
        options = [
            SamplingParams(temperature=0, max_tokens=8, logprobs=2, extra_args={"kif": ids} if ids else None)
            for _, ids, _ in requests
        ]
        outputs = server.llm.generate(
            [p for p, _, _ in requests], options, lora_request=[a for _, _, a in requests], use_tqdm=False
        )
        return [
            (o.outputs[0].text, [{t: lp.logprob for t, lp in e.items()} for e in o.outputs[0].logprobs])
            for o in outputs
        ]

    four = [(FRANCE, None, None), (FRANCE, ["france"], None), (FRANCE, None, lora), (FRANCE, ["france"], lora)]
    plain, gone, adapted, both = run(served, four)
    assert "Paris" in plain[0] and "Paris" not in gone[0] and "Paris" not in both[0]
    assert adapted[1] != plain[1] and both[1] != gone[1]
    # Where nothing fires, LoRA or not, every number is that of stock vLLM in the same schedule.
    same = [(JAPAN, None, None), (JAPAN, None, lora), (JAPAN, ["france"], None), (JAPAN, ["france"], lora)]
    without = [(prompt, None, lora) for prompt, _, lora in same]
    assert run(served, same) == run(stock, without)
    # And each alone answers as in the batch.
    assert [run(served, [request])[0][0] for request in four] == [plain[0], gone[0], adapted[0], both[0]]


def test_speculation_by_ngrams_changes_no_text_and_no_gate(engine, mined):
    """Last in this process: once its proposer has loaded numba, vLLM 0.32 cannot make another engine here."""
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    prompts = [FRANCE, JAPAN, "one two three one two three one two three one", "The official language of Mexico is"]
    stock, plain = engine(), engine({"capsules": mined, "mandatory": []})
    fast = engine({"capsules": mined, "mandatory": []}, speculative_config=speculative)
    assert [a.tokens for a in fast.ask(prompts, max_tokens=24)] == [a.tokens for a in stock.ask(prompts, max_tokens=24)]
    for ids in (["france"], ["france", "mexico"]):
        want, got = plain.ask(prompts, ids, max_tokens=24), fast.ask(prompts, ids, max_tokens=24)
        assert [a.text for a in want] == [a.text for a in got]
        assert [set(a.fired) for a in want] == [set(a.fired) for a in got]
        assert "Paris" not in got[0].text
