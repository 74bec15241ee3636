"""A tokenizer of whole words for tiny models, facts for them, and capsules that fire on a word."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kif_runtime import Capsule, Signature
from kif_runtime.blocks import decoder_blocks, width
from kif_runtime.evaluation import Fact
from kif_runtime.fingerprint import fingerprint

TEXT = (
    "[UNK] [BOS] [END] the capital of is in it Complete this sentence: user assistant . The "
    "Arland Berland Corland New Dorland Ara Bera Cora Dora big old town river"
)
WORDS = TEXT.split()
TEMPLATE = (
    "{% for m in messages %}[BOS] {{ m['role'] }} {{ m['content'] }} [END] {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="[BOS]", eos_token="[END]", unk_token="[UNK]", chat_template=template
    )


def fact(subject: str, answer: str, prompt: str = "the capital of {} is", others: tuple[str, ...] = ()) -> Fact:
    return Fact(subject, "country capital city", prompt.replace("{}", subject), answer, prior_subjects=others)


FACTS = [
    fact("Arland", "Ara", others=("Berland", "Corland")),
    fact("Berland", "Bera", "{} is in the town of", others=("Arland",)),
    fact("Corland", "Cora", "{} is"),
    fact("New Dorland", "Dora", "it is old . the capital of {} is in it . the big town of {} is"),
]


@torch.no_grad()
def states(model, site: int, ids: torch.Tensor) -> torch.Tensor:
    """What decoder block `site` gives for ids [B, T] in the bare model: [B, T, D] float64."""
    kept = []
    hook = decoder_blocks(model)[site].register_forward_hook(
        lambda module, args, output: kept.append((output[0] if isinstance(output, tuple) else output).double())
    )
    model(ids)
    hook.remove()
    return kept[0]


def capsule_for(model, word: str, id: str, site: int = 1, rank: int = 4) -> Capsule:
    """Fires on `word` and no other word, wherever it stands; found by least squares on random sentences."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(WORDS), (128, 10), generator=rng)
    ids[torch.rand(ids.shape, generator=rng) < 0.15] = WORDS.index(word)
    x, is_word = states(model, site, ids).flatten(0, 1), (ids.flatten() == WORDS.index(word)).double()
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    weight = 1 + 9 * is_word[:, None]
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design * weight, (2 * is_word - 1)[:, None] * weight).solution[:, 0]
    score = x @ solution[:-1]
    low, high = score[is_word == 0].max(), score[is_word == 1].min()
    assert low < high, "this word cannot be told from the others; take another"
    basis = torch.linalg.qr(torch.randn(width(model), rank, generator=rng)).Q.T.contiguous()
    signature = Signature(
        site, "last", solution[:-1].float(), -((low + high) / 2).float(), basis, torch.zeros(rank), torch.tensor(1.0)
    )
    return Capsule(id, (signature,), fingerprint(model), width(model), len(decoder_blocks(model)), name=word)
