"""Compiled models, on a small random Llama: the site is one operator of the graph."""

import pytest
import torch

from kif_runtime import Capsule, Signature
from kif_runtime.fingerprint import fingerprint

pytestmark = pytest.mark.slow

WIDTH, BLOCKS, SITE = 64, 4, 1
TOKENS = [5, 9, 33, 71, 8, 12, 99, 100, 3, 64, 27, 45]
PLAIN = {"skip_tokenizer_init": True, "max_model_len": 64, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def small(tiny_model, tmp_path_factory):
    """(a folder with model and capsules, the Hugging Face model, its one capsule: it fires on half of all tokens)."""
    place = tmp_path_factory.mktemp("small")
    sizes = {
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 128,
    }
    model = tiny_model("llama", initializer_range=0.1, tie_word_embeddings=False, **sizes)
    model.save_pretrained(place / "model")
    rng = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(WIDTH, 3, generator=rng, dtype=torch.float64))[0].T.float().contiguous()
    detector = torch.randn(WIDTH, generator=rng)
    with torch.no_grad():
        states = model(torch.tensor([TOKENS, TOKENS[::-1]]), output_hidden_states=True).hidden_states[SITE + 1]
    bias = -((states / states.square().mean(-1, keepdim=True).sqrt()) @ detector).median()
    signature = Signature(SITE, "last", detector, bias, basis, torch.zeros(3), torch.tensor(1.0))
    (place / "capsules").mkdir()
    capsule = Capsule("half", (signature,), fingerprint(model), WIDTH, BLOCKS)
    capsule.save(place / "capsules" / "half.kif.safetensors")
    return place, model, capsule


def ask(engine, ids=None, **more):
    settings = {"max_tokens": 12, "ignore_eos": True, "detokenize": False, "logprobs": 5} | more
    return engine.ask([TOKENS, TOKENS[::-1], TOKENS[3:]], ids, **settings)


def numbers(answers):
    return [(a.tokens, a.logprobs) for a in answers]


def distance(answers, others):
    return max(
        abs(p[t] - q.get(t, p[t]))
        for a, b in zip(answers, others, strict=True)
        for p, q in zip(a.logprobs, b.logprobs, strict=True)
        for t in p
    )


@pytest.fixture(scope="module")
def compiled(small, engine):
    table = {"capsules": small[0] / "capsules", "mandatory": []}
    return engine(table, model=small[0] / "model", enforce_eager=False, **PLAIN)


def test_a_compiled_model_suppresses_as_hugging_face_does(small, compiled):
    from kif_hf import attach

    (_, model, capsule), fired = small, []
    with attach(model, [capsule]) as kif:
        for answer, tokens in zip(ask(compiled, ["half"]), [TOKENS, TOKENS[::-1], TOKENS[3:]], strict=True):
            kif.reset()
            out = model.generate(
                torch.tensor([tokens]),
                max_new_tokens=12,
                min_new_tokens=12,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert list(answer.tokens) == out[0, len(tokens) :].tolist()
            assert answer.fired == kif.fired
            fired.append(answer.fired["half"])
    assert 0 < sum(fired) < 12 + 12 + 9 + 3 * 11


def test_an_idle_compiled_model_equals_one_with_an_empty_bank_bit_for_bit(small, engine, compiled, tmp_path):
    """The distance to stock vLLM, whose graph is another, is measured and small."""
    flags = PLAIN | {"model": small[0] / "model", "enforce_eager": False}
    sites = compiled.command("status")["result"]["sites"]
    empty, stock = engine({"capsules": tmp_path, "sites": sites}, **flags), engine(**flags)
    idle, none, bare = ask(compiled), ask(empty), ask(stock)
    assert numbers(idle) == numbers(none)
    print(f"compiled and idle against stock: log-probabilities differ by at most {distance(idle, bare):.2e}")
    assert distance(idle, bare) < 1e-4


def test_capsules_come_and_go_without_another_compilation(small, compiled):
    from torch._dynamo.utils import counters

    before, graphs = numbers(ask(compiled, ["half"])), counters["stats"]["unique_graphs"]
    compiled.command("unload", id="half")
    plain = numbers(ask(compiled))
    compiled.command("load", name="half.kif.safetensors")
    assert numbers(ask(compiled, ["half"])) == before != plain
    assert counters["stats"]["unique_graphs"] == graphs


def test_the_proof_covers_the_compiled_graph(compiled):
    site = compiled.command("verify")["result"]["sites"][SITE]
    assert site["fired"] == site["tokens"] > 40
