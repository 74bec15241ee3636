"""A prepared tiny random model for mining, with a tokenizer and a corpus to its measure."""

import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kif_runtime import Capsule, mine
from kif_runtime.mining import prepare, preparing
from kif_runtime.mining.corpus import ANY, Corpus, corpus
from tests.mining import ALIAS, DAY, KINDS, NAME, WIDTH


def small_corpus() -> Corpus:
    full = corpus()
    entities = [[e for e in full.entities if e.kind == kind][:30] for kind in KINDS]
    templates = {kind: full.templates[kind] for kind in (ANY, *KINDS)}
    chosen = tuple(e for some in entities for e in some)
    return Corpus(chosen, templates, full.passages[:10], full.written[:10], "0" * 64)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    bpe.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=letters, special_tokens=["<s>"], show_progress=False)
    bpe.train_from_iterator([*corpus().passages, *[NAME, f"in {NAME}", f"in {ALIAS}"] * 200], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory):
    """A prepared model, its tokenizer, the cache folder; `fresh(**config changes)` gives another model."""
    patch = pytest.MonkeyPatch()
    data = small_corpus()
    for module in ("api", "control", "kinds", "paper", "preparing", "sites", "subject"):
        patch.setattr(sys.modules[f"kif_runtime.mining.{module}"], "corpus", lambda: data)
    patch.setitem(prepare.__kwdefaults__, "steps", 2)
    patch.setattr("kif_runtime.mining.neutral.NAMES", 4)
    cache = tmp_path_factory.mktemp("cache")
    patch.setenv("KIF_CACHE", str(cache))

    def fresh(**changes):
        """Tokens can be told apart, and so can the places that one token stands in."""
        sizes = {"vocab_size": 512, "hidden_size": WIDTH, "head_dim": 16, "max_position_embeddings": 1024}
        model = tiny_model("llama", **sizes, initializer_range=0.1, tie_word_embeddings=False, **changes)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5, generator=torch.Generator().manual_seed(1))
        return model

    model, tokenizer = fresh(), byte_level_tokenizer()
    prepare(model, tokenizer)
    yield SimpleNamespace(model=model, tokenizer=tokenizer, cache=cache, corpus=data, fresh=fresh)
    patch.undo()


@pytest.fixture
def cache(tiny, tmp_path, monkeypatch):
    """A cache folder of the test's own, empty, with nothing remembered in memory either."""
    monkeypatch.setenv("KIF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(preparing, "_loaded", {})
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def ostia(tiny) -> Capsule:
    return mine(tiny.model, tiny.tokenizer, NAME, date=DAY)
