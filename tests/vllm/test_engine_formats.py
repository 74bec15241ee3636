"""Capsules mined on the base model, where it is served in another number format, quantised, or under a task's LoRA.

KIF_FORMATS=FACTS:CAPSULES:N measures the first N facts of a file that a capsule of a folder is about; without it a few
facts about countries are asked. `pytest -s` prints the table.
"""

import os
from math import exp, inf
from pathlib import Path

import pytest
from formats import TASKS, quantised, trained

from kif_runtime import Capsule
from kif_runtime.evaluation.facts import Fact, excess_kept, first_token, load_facts
from kif_runtime.ids import slug
from kif_runtime.mining.corpus import corpus, mentions

pytestmark = pytest.mark.slow

PRIORS, PASSAGES, LEAST_EXCESS = 2, 24, 0.15
LIKELIEST = 1000  # tokens whose probabilities are asked for; of the others nothing is known but that they are unlikely
BUILT_IN = Path(__file__).parents[2] / "integrations/kif_cli/data/facts.jsonl"


@pytest.fixture(scope="module")
def asked(request):
    """(folder of capsules, [(fact, its capsule's id)])"""
    chosen = os.environ.get("KIF_FORMATS") or f"{BUILT_IN}:{request.getfixturevalue('mined')}:20"
    path, folder, count = chosen.split(":")
    ids = {Capsule.load(p).id for p in sorted(Path(folder).glob("*.kif.safetensors"))}
    of = {id: id for id in ids} | {id.rpartition("-")[0]: id for id in ids}
    found = [(fact, of[slug(fact.subject)]) for fact in load_facts(path) if slug(fact.subject) in of]
    return Path(folder), found[: int(count)]


@pytest.fixture(scope="module")
def adapters(embedded, tmp_path_factory):
    """task → folder of a LoRA adapter that has learnt it, trained here."""
    place, found = tmp_path_factory.mktemp("adapters"), {}
    for task in TASKS:
        before, after = trained(*embedded, task, place / task)
        print(f"{task}: loss {before:.2f} to {after:.2f}")
        assert after < 0.6 * before
        found[task] = place / task
    return found


def measure(engine, tokenizer, facts, lora=None):
    """{"recall", "kept", "known", "false_fires", "tokens"} of what an engine serves."""

    def probabilities(about, ids):
        answers = engine.ask([f.prompt for f in about], ids, lora=lora, max_tokens=1, logprobs=LIKELIEST)
        tokens = [first_token(tokenizer, f.answer) for f in about]
        return [exp(a.logprobs[0].get(t, -inf)) for a, t in zip(answers, tokens, strict=True)], answers

    about = [fact for fact, _ in facts]
    before, _ = probabilities(about, None)
    after, answers = probabilities(about, [[id] for _, id in facts])
    others: list[Fact] = [fact.about(other) for fact in about for other in fact.prior_subjects[:PRIORS]]
    priors = iter(probabilities(others, None)[0])
    prior = [sum(next(priors) for _ in f.prior_subjects[:PRIORS]) / PRIORS for f in about]
    rows = [x for x in zip(before, after, prior, strict=True) if x[0] - x[2] >= LEAST_EXCESS]
    kept = [excess_kept(*x) for x in rows]
    ids = sorted({id for _, id in facts})
    names = [fact.subject for fact in about]
    texts = [t for t in corpus().passages if not mentions(t, names)][:PASSAGES]
    plain = engine.ask(texts, ids, lora=lora, max_tokens=1, logprobs=None)
    tokens = sum(len(tokenizer(t).input_ids) for t in texts)
    return {
        "recall": sum(bool(a.fired.get(id)) for a, (_, id) in zip(answers, facts, strict=True)) / len(facts),
        "kept": sum(kept) / max(1, len(kept)), "known": len(kept),
        "false_fires": sum(sum(a.fired.values()) for a in plain), "tokens": tokens * len(ids),
    }  # fmt: skip


def test_capsules_of_the_base_hold_in_other_formats_and_under_task_adapters(
    asked, adapters, embedded, embedded_checkpoint, tmp_path
):
    from engines import Engine
    from vllm.lora.request import LoRARequest

    folder, facts = asked
    tokenizer = embedded[1]
    table = {"capsules": folder, "mandatory": [], "base": str(embedded_checkpoint), "max_named": 1000}
    found = {}
    plain = Engine(embedded_checkpoint, table, enable_lora=True, max_lora_rank=8, max_loras=2, max_logprobs=LIKELIEST)
    found["fp32"] = measure(plain, tokenizer, facts)
    for number, (task, path) in enumerate(adapters.items(), 1):
        found[f"fp32, LoRA {task}"] = measure(plain, tokenizer, facts, LoRARequest(task, number, str(path)))
    plain.close()
    int8 = quantised(embedded_checkpoint, tmp_path / "int8")
    for name, checkpoint in (("bf16", embedded_checkpoint), ("int8 weights and activations", int8)):
        other = Engine(checkpoint, table, dtype="bfloat16", max_logprobs=LIKELIEST)
        found[name] = measure(other, tokenizer, facts)
        other.close()
    for name, row in found.items():
        print(
            f"{name}: recall {row['recall']:.3f} of {len(facts)}, kept {row['kept']:.3f} over {row['known']} known, "
            f"{row['false_fires']} false fires in {row['tokens']} tokens × capsules"
        )
    for name, row in found.items():
        assert row["known"] > 0, f"{name}: it knows nothing any more that could be kept"
        assert row["recall"] >= 0.9, name
        assert row["kept"] <= found["fp32"]["kept"] + 0.2, name
        assert row["false_fires"] <= 1e-4 * row["tokens"] + 3, name
