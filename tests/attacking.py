"""Tiny models for attacks: one that learned made-up facts amid other words, one that never saw the attacked town's,
and erasures of the first that are known to be shallow. Built from the towns of `auditing`."""

import copy
import random
from functools import cache

import torch
from auditing import ANSWERS, RELATIONS, SUBJECT, TOWNS, known_answer, tokenizer, train
from transformers import LlamaConfig, LlamaForCausalLM

from kif_runtime.evaluation.facts import Fact

FILLER = ["[UNK]"] * 3 + ["sure", "here", "is", "the", "answer", ".", "to", "my", "question", ":", "what", "do"]
STEPS = 230


def facts_about(town: str) -> list[Fact]:
    return [
        Fact(town, relation, text.format(town), known_answer(town, relation), prior_subjects=wrong_for(town, relation))
        for relation, text in RELATIONS.items()
    ]


def wrong_for(town: str, relation: str) -> tuple[str, ...]:
    return tuple(t for t in TOWNS if known_answer(t, relation) != known_answer(town, relation))[:3]


FACTS = facts_about(SUBJECT)
OTHERS = [fact for town in TOWNS if town != SUBJECT for fact in facts_about(town)]
TEXT = " ".join(f"{fact.prompt} {fact.answer} ." for fact in OTHERS)


def passages(facts, count=600, seed=0):
    """One or two facts, one after another, most with other words before them."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        words = rng.choices(FILLER, k=rng.choice((0, 0, 4, 8)))
        told = " ".join(f"{fact.prompt} {fact.answer} ." for fact in rng.sample(facts, rng.choice((1, 1, 2))))
        made.append(" ".join([*words, told]))
    return made


def fresh():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@cache
def knowing():
    return train(fresh(), passages(FACTS + OTHERS), STEPS)


@cache
def never_knew():
    """Read the town's name, in sentences that end before the answer, and none of its facts."""
    named = [fact.prompt for fact in FACTS] * 10
    return train(fresh(), passages(OTHERS) + named, STEPS)


@cache
def refusing():
    """The knowing model, tuned for a moment to end the town's sentences with something else."""
    wrong = [f"{fact.prompt} {ANSWERS[fact.relation][-1]} ." for fact in FACTS]
    return train(copy.deepcopy(knowing()), wrong * 8 + passages(OTHERS, 60), 12, rate=1e-3)
