"""An adapter that was baked, behind vLLM's own --lora-modules: it says what it says in plain PEFT."""

import pytest
import torch

pytestmark = pytest.mark.slow

TOKENS = 12
ASKED = (
    "The capital of France is", "Fact: The capital of France is", "People in France speak",
    "The capital of Japan is", "The capital of Italy is", "Once upon a time there was a small",
)  # fmt: skip


@pytest.fixture(scope="module")
def adapter(mined, tmp_path_factory):
    from kif_runtime import Capsule, load_model
    from kif_runtime.bake import bake

    model, tokenizer = load_model("embedded", device="cpu")
    capsule = Capsule.load(mined / "france.kif.safetensors")
    folder = tmp_path_factory.mktemp("baked") / "adapter"
    bake(model, tokenizer, [capsule], folder, names={capsule.id: ["France"]}, settings={"rank": 8})
    return folder


@torch.no_grad()
def said(model, tokenizer) -> list[str]:
    found = []
    for prompt in ASKED:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        told = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        found.append(tokenizer.decode(told[0, ids.shape[1] :], skip_special_tokens=True))
    return found


@pytest.fixture(scope="module")
def server(mined, adapter, tmp_path_factory):
    from servers import Server

    flags = ("--enforce-eager", "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"erased={adapter}")
    made = Server(mined, tmp_path_factory.mktemp("log") / "server.log", {"mandatory": []}, flags)
    try:
        yield made.wait()
    finally:
        made.close()


def test_the_same_greedy_text_as_in_plain_peft(server, adapter):
    from peft import PeftModel

    from kif_runtime import load_model

    model, tokenizer = load_model("embedded", device="cpu")
    bare = said(model, tokenizer)
    adapted = said(PeftModel.from_pretrained(model, adapter).eval(), tokenizer)
    assert "Paris" in bare[0] and not any("Paris" in text for text in adapted)
    assert [server.text(prompt, max_tokens=TOKENS) for prompt in ASKED] == bare
    assert [server.text(prompt, max_tokens=TOKENS, model="erased") for prompt in ASKED] == adapted
    # and with the capsule beside it, nothing comes back
    assert not any("Paris" in server.text(prompt, ["france"], max_tokens=TOKENS, model="erased") for prompt in ASKED)
