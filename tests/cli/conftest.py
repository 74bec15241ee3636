"""A tiny model with a tokenizer in a folder, as --model takes it, and capsules made by hand for it."""

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from kif_cli.main import app
from kif_runtime import Capsule, Signature
from kif_runtime.fingerprint import fingerprint

TEXT = "the capital of japan korea france is tokyo seoul paris what ? . rice and city in a <b> Ä"
WORDS = TEXT.split()
CHAT = "{% for m in messages %}what {{ m['content'] }} ? {% endfor %}{% if add_generation_prompt %}. {% endif %}"
WIDTH, BLOCKS = 32, 4


@pytest.fixture
def kif():
    """kif(*arguments) -> the result of the command, with exit_code, stdout and stderr."""

    def run(*arguments):
        result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="kif")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception  # a traceback for the user
        result.json = json.loads(result.stdout) if result.exit_code != 2 and "--json" in arguments else None
        return result

    return run


@pytest.fixture
def refused(kif):
    """refused(*arguments) -> the one line on stderr that a refusal consists of."""

    def run(*arguments):
        result = kif(*arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        lines = [line for line in result.stderr.splitlines() if line != "loading the model"]
        assert len(lines) == 1
        assert lines[0].startswith("kif: ")
        return lines[0]

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tiny_model):
    """A folder with a random Llama over WORDS, and what is in it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=CHAT, **special).save_pretrained(folder)
    model = tiny_model("llama", vocab_size=len(words), initializer_range=0.1, tie_word_embeddings=False)
    torch.nn.init.normal_(model.get_input_embeddings().weight, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model, tokenizer=AutoTokenizer.from_pretrained(folder), words=words)


@torch.no_grad()
def detector(tiny, site, word):
    """(w, b) that fires on the states of `word` and of no other word, by least squares over random sentences."""
    rng = torch.Generator().manual_seed(site)
    ids = torch.randint(3, len(tiny.words), (256, 8), generator=rng)
    x = tiny.model(ids, output_hidden_states=True).hidden_states[site + 1].double().flatten(0, 1)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    wanted = ids.flatten() == tiny.words[word]
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    weight = (1 + 4 * wanted)[:, None].double()
    solution = torch.linalg.lstsq(design * weight, (2.0 * wanted - 1)[:, None].double() * weight).solution[:, 0]
    scores = design @ solution
    low, high = scores[~wanted].max(), scores[wanted].min()
    assert high > low
    return solution[:-1].float(), (solution[-1] - (low + high) / 2).float()


@pytest.fixture(scope="session")
def capsule(tiny):
    """A capsule that fires on the word japan and on no other, at blocks 0 and 1, and moves it far away."""
    signatures = []
    for site in (0, 1):
        w, b = detector(tiny, site, "japan")
        basis = torch.linalg.qr(torch.randn(WIDTH, 2, generator=torch.Generator().manual_seed(site)))[0].T.contiguous()
        signatures.append(Signature(site, "last", w, b, basis, torch.full((2,), 9.0), torch.tensor(1.0)))
    return Capsule("japan", tuple(signatures), fingerprint(tiny.model), WIDTH, BLOCKS)


@pytest.fixture
def capsule_file(capsule, tmp_path):
    path = tmp_path / "japan.kif.safetensors"
    capsule.save(path)
    return path
