"""What RWKU measures beside the forgotten: MMLU, TruthfulQA (MC1), TriviaQA (F1), BBH (EM) and fluency.

The copies that are to be had lack MMLU's five examples and BBH's chains of thought, so both are asked without; MMLU and
TruthfulQA are scored as plain text and not as chats. Their numbers compare states with one another, not with published
ones.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .audit import Audit
from .json_lines import read_rows
from .rwku_probes import cut
from .states import State
from .statistics import interval, share
from .utility import accuracy, sampled
from .utility_tasks import load_items

CHOICES = {"mmlu": "utility_mmlu_35pertask.jsonl", "truthfulqa_mc1": "utility_truthfulqa.jsonl"}
TRIVIA, HARD, FLUENCY = "utility_triviaqa_sample1500.jsonl", "utility_bbh_15pertask.jsonl", "utility_fluency.jsonl"
EXAMPLES = (  # the benchmark's own five
    "\nQ: When did men's figure skating become a summer Olympic sport?\nA: 1908\n"
    "Q: When did the all india workers and peasants party came in to existence?\nA: November 1925\n"
    "Q: Flight that went down in the hudson river?\nA: US Airways Flight 1549\n"
    "Q: Where are most of the world's earthquakes located?\nA: Rim of Fire\n"
    "Q: Csi when do grissom and sara reunite?\nA: series finale\n"
    "Please briefly answer the following question:\n"
)


def utility(audit: Audit, folder: Path) -> list[dict[str, Any]]:
    """[{"task", "questions", state: {...}}] for each file that is there."""
    count = audit.pick(quick=10, full=100)
    table = []
    for task, name in CHOICES.items():
        if (folder / name).is_file():
            items = sampled(load_items(folder / name), count, audit.random(name))
            row: dict[str, Any] = {"task": task, "questions": len(items)}
            for state in audit.states:
                with audit.running(state) as on:
                    row[state.name] = accuracy(on.model, audit.tokenizer, items)["accuracy"]
            table.append(row)
    for task, name, ask in (("triviaqa_f1", TRIVIA, trivia), ("bbh_em", HARD, hard), ("fluency", FLUENCY, fluency)):
        if (folder / name).is_file():
            fields = {"instruction": str} if task == "fluency" else {"question": str}
            rows = sampled(read_rows(folder / name, fields), count, audit.random(name))
            table.append({"task": task, "questions": len(rows)} | {s.name: ask(audit, s, rows) for s in audit.states})
    return table


def trivia(audit: Audit, state: State, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of the best F1 over each question's answers."""
    said = _said(audit, state, [f"{EXAMPLES}Q: {row['question']}\n" for row in rows], "A:", 30)
    values = [max(token_f1(cut(text), a) for a in row["answers"]) for text, row in zip(said, rows, strict=True)]
    return {"mean": float(np.mean(values)), "interval": interval(values, range(len(values)))}


def hard(audit: Audit, state: State, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The share of answers that are exactly right, once what follows "the answer is" is taken."""
    asked = [f"Answer the following question and end with 'so the answer is'\nQ: {row['question']}" for row in rows]
    said = _said(audit, state, asked, "A:", 64)
    return share([normal(final(text)) == normal(row["answer"]) for text, row in zip(said, rows, strict=True)])


def fluency(audit: Audit, state: State, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean n-gram entropy of answers to instructions."""
    said = _said(audit, state, [f"Instruction: {row['instruction']}\n" for row in rows], "", 64)
    values = [ngram_entropy(text) for text in said]
    return {"mean": float(np.mean(values)), "interval": interval(values, range(len(values)))}


def _said(audit: Audit, state: State, users: Sequence[str], opening: str, new_tokens: int) -> list[str]:
    prompts = []
    for user in users:
        turns = [{"role": "user", "content": user}]
        text = audit.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + opening
        prompts.append(audit.tokenizer(text, add_special_tokens=False)["input_ids"])
    return [one.text for one in audit.go_on(state, prompts, new_tokens, what=f"{state.name}: utility")]


def normal(text: str) -> str:
    """Lower case without punctuation and articles, single spaces."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def token_f1(text: str, answer: str) -> float:
    """F1 of the words of `normal` texts, with their counts; 1 where both are empty."""
    got, wanted = normal(text).split(), normal(answer).split()
    if not got or not wanted:
        return float(got == wanted)
    common = sum((Counter(got) & Counter(wanted)).values())
    return 2 * common / (len(got) + len(wanted))


def final(text: str) -> str:
    """What follows "the answer is" up to a full stop, or all of it."""
    found = re.search(r"[tT]he answer is (.*?)\.", text)
    return found.group(1).strip() if found else text.strip()


def ngram_entropy(text: str, weights: Sequence[float] = (2 / 3, 4 / 3)) -> float:
    """Mean of 2/3 · H₂ and 4/3 · H₃, entropies in bits of word pairs and triples; 0 for fewer than two words. Words and
    punctuation marks count as words."""
    words = re.findall(r"\w+|[^\w\s]", text)
    return sum(w * _entropy(words, n) for n, w in enumerate(weights, 2)) / len(weights)


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0
