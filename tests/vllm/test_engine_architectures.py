"""Every architecture of the registry: what vLLM forms at a site is what the Hugging Face model gives there."""

import pytest
import torch

from kif_runtime.blocks import decoder_blocks

pytestmark = pytest.mark.slow

WIDTH, HEADS, BLOCKS = 64, 2, 4  # vLLM's attention on the CPU wants heads of at least 32
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "gpt2", "opt"]
CHANGES = {
    "gpt2": {"n_embd": WIDTH, "n_head": HEADS, "n_positions": 128},
    "opt": {"word_embed_proj_dim": WIDTH, "do_layer_norm_before": True},
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "gemma3_text": {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "mistral": {"sliding_window": None},
}
HEAD_DIM = {"head_dim": WIDTH // HEADS}
SITES = [0, 1, 3]
TOKENS = [5, 9, 33, 71, 8, 12, 99, 100, 3, 64, 27, 45]


def checkpoint(tiny_model, family, folder):
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": BLOCKS}
    if family not in ("gpt2", "gpt_neox", "opt"):
        sizes |= {"num_key_value_heads": 1, "intermediate_size": 2 * WIDTH} | HEAD_DIM
    model = tiny_model(family, initializer_range=0.1, **sizes | CHANGES.get(family, {}))
    for (
        parameter
    ) in model.parameters():  # norms of a new model are all ones, biases all zeros: they would hide mistakes
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_the_outputs_of_the_decoder_blocks(family, tiny_model, tmp_path):
    from engines import Engine

    model = checkpoint(tiny_model, family, tmp_path / "model")
    (tmp_path / "capsules").mkdir()
    table = {"capsules": tmp_path / "capsules", "sites": SITES}
    engine = Engine(tmp_path / "model", table, skip_tokenizer_init=True, max_model_len=64)  # its start runs the proof
    states = {}
    blocks = decoder_blocks(model)
    for site in SITES:
        blocks[site].register_forward_hook(
            lambda module, args, out, site=site: states.update({site: (out[0] if isinstance(out, tuple) else out)[0]})
        )
    with torch.no_grad():
        model(torch.tensor([TOKENS]))
    try:
        assert sorted(engine.worker.sites) == SITES
        for site in engine.worker.sites.values():
            site.witness = []
        engine.ask([TOKENS], max_tokens=1, detokenize=False, logprobs=None)
        for block, site in engine.worker.sites.items():
            before = site.witness[0][0].float()
            error = (before - states[block]).abs().amax(-1) / states[block].abs().amax(-1)
            assert float(error.max()) < 1e-3, (block, error)
    finally:
        engine.close()


def test_an_architecture_that_is_not_known_is_refused(tiny_model, tmp_path):
    from engines import Engine

    checkpoint(tiny_model, "gpt_neox", tmp_path / "model")  # vLLM serves it through its Transformers backend
    (tmp_path / "capsules").mkdir()
    with pytest.raises(Exception, match="KIF does not know"):
        Engine(
            tmp_path / "model",
            {"capsules": tmp_path / "capsules", "sites": [1]},
            skip_tokenizer_init=True,
            max_model_len=64,
        )
