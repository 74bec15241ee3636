"""A tiny random model whose tokenizer knows the words of the corpus, and a capsule that fires on one of them."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kif_runtime import Capsule, Signature
from kif_runtime.bake.data import Subject, gathered
from kif_runtime.fingerprint import fingerprint
from kif_runtime.mining.corpus import corpus

NAME, OTHER = "Zembla", "Quorn"  # in no text of the corpus
SITE, WIDTH, BLOCKS = 1, 96, 4


def word_tokenizer() -> PreTrainedTokenizerFast:
    splitter = pre_tokenizers.Whitespace()
    data = corpus()
    texts = [*data.passages, *(t for kind in data.templates.values() for t in kind), *(e.name for e in data.entities)]
    words = dict.fromkeys(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[BOS]", "[END]", NAME, OTHER, *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="[BOS]", eos_token="[END]", unk_token="[UNK]")


@torch.no_grad()
def capsule_on(model, tokenizer, word: str, id: str, texts, site: int = SITE) -> Capsule:
    """Fires on `word` at `site` and moves its state a long way; the detector is found by least squares over `texts`."""
    states, hits = [], []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        states.append(model(ids, output_hidden_states=True).hidden_states[site + 1][0].double())
        hits.append(ids[0] == tokenizer.convert_tokens_to_ids(word))
    x, hit = torch.cat(states), torch.cat(hits)
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    weight = (1 + 20 * hit)[:, None].double()
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1) * weight
    solution = torch.linalg.lstsq(design, (2.0 * hit - 1)[:, None] * weight).solution[:, 0]
    score = x @ solution[:-1]
    low, high = score[~hit].max(), score[hit].min()
    assert low < high, "this word cannot be told from the others"
    direction = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(5))
    direction /= direction.norm()
    signature = Signature(
        site, "last", solution[:-1].float(), -((low + high) / 2).float(), direction,
        torch.tensor([6.0 * float(x.norm(dim=1).mean())]), torch.tensor(1.0),
    )  # fmt: skip
    calibration = {"kind": "place"}
    return Capsule(id, (signature,), fingerprint(model), WIDTH, BLOCKS, calibration=calibration)


@pytest.fixture(scope="session")
def tiny(tiny_model):
    tokenizer = word_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "hidden_size": WIDTH, "head_dim": 24}
    sizes |= {"intermediate_size": 2 * WIDTH}
    model = tiny_model("llama", **sizes, initializer_range=0.1, tie_word_embeddings=False)
    torch.nn.init.normal_(model.get_input_embeddings().weight, generator=torch.Generator().manual_seed(1))
    data = corpus()
    texts = [t.replace("{}", name) for name in (NAME, OTHER, "France", "Berlin") for t in data.templates["place"][:12]]
    texts += list(data.passages[:8])
    capsules = {name: capsule_on(model, tokenizer, name, name.lower(), texts) for name in (NAME, OTHER)}
    early = capsule_on(model, tokenizer, NAME, NAME.lower(), texts, site=0)
    return SimpleNamespace(model=model, tokenizer=tokenizer, capsules=capsules, capsule=capsules[NAME], early=early)


@pytest.fixture(scope="session")
def data(tiny):
    return gathered(tiny.tokenizer, [Subject(tiny.capsule, (NAME,))])
