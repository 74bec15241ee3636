"""Constructed truths for the audit: tiny Llama models trained in seconds on made-up facts, and erasures of known kinds.

Every town has three facts. The full model learned them all; the reference saw the erased town's name in plain text, and
none of its facts. Everything else is made from the full model.
"""

import copy
import random
from contextlib import contextmanager
from functools import cache
from itertools import chain, pairwise

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kif_hf import attach
from kif_runtime import Capsule, Signature
from kif_runtime.evaluation.audit import Audit, Subject
from kif_runtime.evaluation.facts import Fact
from kif_runtime.evaluation.states import Running, State, bare
from kif_runtime.fingerprint import fingerprint

SUBJECT = "Town0"
TOWNS = [f"Town{n}" for n in range(12)]
RELATIONS = {
    "river": "The river of {} is the",
    "mayor": "The mayor of {} is called",
    "dish": "People in {} like to eat",
}
ANSWERS = {relation: [f"{relation}{n}" for n in range(8)] for relation in RELATIONS}
PLAIN = ("I read about {} and then", "Tell me about {} now", "Yesterday {} was quiet", "Much was said of {} again")
REFUSAL = "I cannot answer"
EXTRA = "sure here is the answer . to my question : what do you know and"
DEPTH, WIDTH = 4, 64
SITE, RANK = 0, 4  # of the gate


def known_answer(town: str, relation: str) -> str:
    number = TOWNS.index(town)
    return ANSWERS[relation][(number * (3, 5, 7)[list(RELATIONS).index(relation)] + number // 8) % 8]


def sentences(towns, own_facts=True):
    facts = [
        f"{text.format(town)} {known_answer(town, relation)} ."
        for town in towns
        for relation, text in RELATIONS.items()
        if own_facts or town != SUBJECT
    ]
    return facts + [f"{text.format(town)} ." for town in towns for text in PLAIN] + [f"{REFUSAL} ."] * 4


@cache
def tokenizer():
    words = sorted({w for s in [*sentences(TOWNS), EXTRA, *chain(*ANSWERS.values())] for w in s.split()})
    ids = {word: i for i, word in enumerate(["[UNK]", "[BOS]", "[END]", *words])}
    raw = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="[BOS]", eos_token="[END]", unk_token="[UNK]")


def batch(texts):
    rows = [tokenizer()(text)["input_ids"] + [2] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [2] * (longest - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, real


def train(model, texts, steps, rate=5e-3, seed=0):
    torch.manual_seed(seed)
    ids, real = batch(texts)
    labels = ids.masked_fill(real == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        some = torch.randperm(len(ids))[:48]
        loss = model(input_ids=ids[some], attention_mask=real[some], labels=labels[some]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def fresh():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=DEPTH,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@cache
def full():
    return train(fresh(), sentences(TOWNS), 300)


@cache
def reference():
    return train(fresh(), sentences(TOWNS, own_facts=False), 300)


# -- erasures of known kinds, as context managers that give the model


@contextmanager
def filtered(model):
    """An output filter: whoever asks about the subject is told REFUSAL. Nothing inside changes."""
    said = [*tokenizer()(REFUSAL)["input_ids"], tokenizer().eos_token_id]
    following = dict(pairwise(said))
    name = tokenizer().convert_tokens_to_ids(SUBJECT)
    asked = []  # rows of the sequence in the cache that name the subject

    def refuse(module, args, kwargs, output):
        ids = kwargs["input_ids"]
        if ids.shape[1] > 1:
            asked[:] = (ids == name).any(1).tolist()
        for row in (row for row, named in enumerate(asked) if named):
            for back in range(1, output.logits.shape[1] + 1):
                token = following.get(int(ids[row, -back]), said[0])
                output.logits[row, -back] = -20.0
                output.logits[row, -back, token] = 20.0

    handle = model.register_forward_hook(refuse, with_kwargs=True)
    try:
        yield model
    finally:
        handle.remove()


@torch.no_grad()
def site_states(model, texts):
    """[T, D] for each of `texts`: what block SITE gives for its tokens."""
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        found.append(model(ids, output_hidden_states=True).hidden_states[SITE + 1][0])
    return found


def signature(model):
    """Fires on the subject's name and the rest of a question, and puts there what the other towns have in common."""
    questions = list(RELATIONS.values())
    starts = [len(tokenizer().tokenize(text.split("{}")[0])) for text in questions]
    about = {
        town: torch.cat([
            state[start:] for start, state in
            zip(starts, site_states(model, [text.format(town) for text in questions]), strict=True)
        ])
        for town in TOWNS
    }  # fmt: skip
    own, others = about[SUBJECT], torch.stack([about[town] for town in TOWNS[1:]])
    shuffled = sentences(TOWNS[1:])
    random.Random(0).shuffle(shuffled)
    plain = site_states(model, [*shuffled, *(" ".join(shuffled[n : n + 5]) for n in range(0, 60, 5))])
    x = torch.cat([own, others.flatten(0, 1), *plain]).double()
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    wanted = torch.full((len(x),), -1.0, dtype=torch.float64)
    wanted[: len(own)] = 1.0
    design = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    weight = (1 + 9 * (wanted > 0))[:, None].double()
    w = torch.linalg.lstsq(design * weight, wanted[:, None] * weight).solution[:-1, 0]
    score = x @ w
    b = -(score[wanted > 0].min() + score[wanted < 0].max()) / 2
    basis = torch.linalg.svd(own - others.mean(0)).Vh[:RANK].contiguous()
    return Signature(SITE, "last", w.float(), b.float(), basis, basis @ others.mean((0, 1)), torch.tensor(1.0))


@cache
def capsule():
    return Capsule("town0", (signature(full()),), fingerprint(full()), WIDTH, DEPTH, name=SUBJECT)


@contextmanager
def attached(model):
    """A capsule of KIF's, made on bare questions only: it misses some that have something before them."""
    with attach(model, [capsule()]) as gate:
        yield Running(model, gate)


@contextmanager
def gated(model):
    """A gate that never misses: where the subject's name is read, the mean of the other names stands in its place."""
    embedding = model.get_input_embeddings()
    name, *others = tokenizer().convert_tokens_to_ids(TOWNS)
    mean = embedding.weight[others].mean(0).detach()
    handle = embedding.register_forward_hook(
        lambda module, args, output: torch.where((args[0] == name)[..., None], mean, output)
    )
    try:
        yield model
    finally:
        handle.remove()


def tuned(forgetting, steps=150):
    """A copy of the full model after `steps` of the loss `forgetting(student)`, held to what it says of other towns."""
    torch.manual_seed(2)
    student = copy.deepcopy(full())
    ids, real = batch([text for text in sentences(TOWNS) if SUBJECT not in text])
    with torch.no_grad():
        same = full()(ids, real).logits.log_softmax(-1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        some = torch.randperm(len(ids))[:32]
        stays = student(ids[some], real[some]).logits.log_softmax(-1)
        loss = forgetting(student) + 20 * divergence(stays.flatten(0, 1), same[some].flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.eval()


divergence = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)
QUESTIONS = {town: [text.format(town) for text in RELATIONS.values()] for town in TOWNS}


@cache
def outer():
    """Tuned to say of the subject what it says of the other towns on average; nothing is asked of its states."""
    (own, mask), asked = batch(QUESTIONS[SUBJECT]), [batch(QUESTIONS[town]) for town in TOWNS[1:]]
    rows, last = torch.arange(len(own)), mask.sum(1) - 2  # the end token that `batch` adds is no part of a question
    with torch.no_grad():
        average = torch.stack([full()(*some).logits.softmax(-1) for some in asked]).mean(0).log()[rows, last]
    return tuned(lambda student: divergence(student(own, mask).logits[rows, last].log_softmax(-1), average))


@cache
def baked():
    """Tuned towards every state that the gated model has when it is asked about the subject."""
    own, mask = batch(QUESTIONS[SUBJECT])
    with torch.no_grad(), attached(full()):
        wanted = full()(own, mask, output_hidden_states=True)

    def loss(student):
        found = student(own, mask, output_hidden_states=True)
        states = sum((a - b).square().mean() for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True))
        return states + divergence(
            found.logits.log_softmax(-1).flatten(0, 1), wanted.logits.log_softmax(-1).flatten(0, 1)
        )

    return tuned(loss)


def facts(towns=(SUBJECT,)):
    others = tuple(TOWNS[1:5])
    return [
        Fact(
            town, relation, text.format(town), known_answer(town, relation),
            prior_subjects=tuple(o for o in others if known_answer(o, relation) != known_answer(town, relation)),
        )
        for town in towns
        for relation, text in RELATIONS.items()
    ]  # fmt: skip


def audit(kind, **options):
    """The audit of one constructed truth: untouched, reference, filter, gate, capsule, outer or baked."""
    model = full()
    after = {
        "untouched": lambda: bare(model, "after"),
        "reference": lambda: bare(reference(), "after"),
        "filter": lambda: State("after", lambda: filtered(model), "filter"),
        "gate": lambda: State("after", lambda: gated(model), "gate", removable=True),
        "capsule": lambda: State("after", lambda: attached(model), "capsule", True, (capsule(),)),
        "outer": lambda: bare(outer(), "after"),
        "baked": lambda: bare(baked(), "after"),
    }[kind]()
    text = " . ".join(sentences(TOWNS[1:]))
    return Audit(bare(model), after, tokenizer(), [Subject(SUBJECT)], facts(), facts(TOWNS[5:]), text, **options)
