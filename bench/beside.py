"""An erasure beside what else a model wears: its own capsule, and a LoRA adapter that was trained for a task.

    python bench/beside.py --facts FACTS --count 2

Bakes one adapter for the subjects, trains a LoRA of rank 8 on a task (saying the opposite, in a fixed form), and asks
each combination: what is kept of the facts, how far facts about others moved from what the model without the erasure
says, and the task's loss on sentences that it was not trained on.
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import common
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from kif_hf import attach
from kif_runtime.bake import bake
from kif_runtime.evaluation import load_facts
from kif_runtime.evaluation.facts import Fact, answer_probabilities, padded, prior_probabilities
from kif_runtime.evaluation.run import fact_row, kept_summaries

COLUMNS = ("", "kept", "|Δp| near", "task loss")
THINGS = ("cup", "door", "hat", "boat", "chair", "lamp", "shoe", "ball", "book", "coat", "wheel", "box")
WORDS = (("big", "small"), ("old", "new"), ("hot", "cold"), ("wet", "dry"), ("near", "far"), ("full", "empty"))
SENTENCES = [(f"Say the opposite: the {t} is {a}.", f" The {t} is {b}.") for t in THINGS for a, b in WORDS]
HELD = SENTENCES[::5]
TAUGHT = [s for s in SENTENCES if s not in HELD]
STEPS, ROWS, RATE = 16, 8, 2e-4  # learns the task, and leaves most facts known


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--count", type=int, default=2, help="subjects (default: 2)")
    options.add_argument("--neighbours", type=int, default=40, help="facts about others (default: 40)")
    args = options.parse_args()
    model, tokenizer = common.load(args)
    facts = load_facts(args.facts)
    names = list(dict.fromkeys(fact.subject for fact in facts))
    random.Random(args.seed).shuffle(names)
    mined = [m for m in common.Mine(model, tokenizer, args).all(names[: args.count]) if m.capsule is not None]
    table = Table(model, tokenizer, facts, [m.subject for m in mined], args)
    rows = table.rows([m.capsule for m in mined])
    common.show("An erasure beside a capsule and a task's adapter", COLUMNS, rows)
    common.write_json(args.json, {"columns": COLUMNS, "rows": rows})


class Table:
    """The questions, and what is asked of the model in each state."""

    def __init__(
        self, model: Any, tokenizer: Any, facts: Sequence[Fact], subjects: Sequence[str], args: argparse.Namespace
    ) -> None:
        self.model, self.tokenizer, self.subjects, self.seed = model, tokenizer, subjects, args.seed
        self.own = [f for f in facts if f.subject in subjects]
        others = [f for f in facts if f.subject not in subjects]
        self.others = random.Random(args.seed).sample(others, min(args.neighbours, len(others)))
        self.before = answer_probabilities(model, tokenizer, self.own)
        self.priors = prior_probabilities(model, tokenizer, self.own)

    def rows(self, capsules: Sequence[Any]) -> list[list[Any]]:
        with tempfile.TemporaryDirectory() as folder:
            erasure, task = Path(folder) / "erasure", Path(folder) / "task"
            with torch.enable_grad():
                names = {c.id: [s] for c, s in zip(capsules, self.subjects, strict=True)}
                bake(self.model, self.tokenizer, list(capsules), erasure, names=names, seed=self.seed)
                taught(self.model, self.tokenizer, task, self.seed)
            both = PeftModel.from_pretrained(self.model, erasure, adapter_name="erasure").eval()
            both.load_adapter(task, "task")
            both.add_weighted_adapter(["task", "erasure"], [1.0, 1.0], "sum", combination_type="cat")
            both.add_weighted_adapter(["task", "erasure"], [0.5, 0.5], "mean", combination_type="cat")

            def gate() -> AbstractContextManager[Any]:
                return attach(self.model, capsules)

            def wearing(*adapters: str) -> Callable[[], AbstractContextManager[Any]]:
                def wear() -> AbstractContextManager[Any]:
                    both.base_model.set_adapter(list(adapters))
                    return nullcontext()

                return wear

            def gated(*adapters: str) -> Callable[[], AbstractContextManager[Any]]:
                return lambda: (wearing(*adapters)(), gate())[1]

            with both.disable_adapter():
                bare = self.asked(nullcontext)
                found = [self.row("bare", bare, bare), self.row("capsule", self.asked(gate), bare)]
            for name, state in (("adapter", wearing("erasure")), ("adapter and capsule", gated("erasure"))):
                found.append(self.row(name, self.asked(state), bare))
            tuned = self.asked(wearing("task"))
            found.append(self.row("task", tuned, tuned))
            for name, state in (
                ("task, capsule", gated("task")), ("task and adapter stacked", wearing("erasure", "task")),
                ("weighted 1 + 1 (cat)", wearing("sum")), ("weighted ½ + ½ (cat)", wearing("mean")),
            ):  # fmt: skip
                found.append(self.row(name, self.asked(state), tuned))
            both.unload()
        return found

    def asked(self, state: Callable[[], AbstractContextManager[Any]]) -> tuple[list[float], list[float], float]:
        with state():
            answers = answer_probabilities(self.model, self.tokenizer, [*self.own, *self.others])
            loss = float(task_loss(self.model, self.tokenizer, HELD))
        return answers[: len(self.own)], answers[len(self.own) :], loss

    def row(self, name: str, now: tuple[Any, ...], without: tuple[Any, ...]) -> list[Any]:
        pairs = zip(self.own, self.before, now[0], self.priors, strict=True)
        kept = kept_summaries([fact_row(f, b, a, p or 0.0) for f, b, a, p in pairs])["kept"].get("mean")
        moved = common.mean(abs(a - b) for a, b in zip(now[1], without[1], strict=True))
        return [name, kept, moved, now[2]]


def taught(model: Any, tokenizer: Any, folder: Path, seed: int) -> None:
    """Train a LoRA on TAUGHT, on all linear layers, and save it; `model` is left as it was."""
    asks = {name: p.requires_grad for name, p in model.named_parameters()}
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimiser = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=RATE)
    order = random.Random(seed)
    for _ in range(STEPS):
        optimiser.zero_grad()
        task_loss(wrapped, tokenizer, order.sample(TAUGHT, ROWS)).backward()
        optimiser.step()
    wrapped.save_pretrained(folder)
    wrapped.unload()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(asks[name])


def task_loss(model: Any, tokenizer: Any, sentences: Sequence[tuple[str, str]]) -> Tensor:
    """Mean −log p of the answers' tokens."""
    rows = [(tokenizer(asked)["input_ids"], tokenizer(told)["input_ids"]) for asked, told in sentences]
    ids, mask = padded([asked + told for asked, told in rows])
    labels = ids.masked_fill(mask == 0, -100)
    for label, (asked, _) in zip(labels, rows, strict=True):
        label[: len(asked)] = -100
    loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss


if __name__ == "__main__":
    common.run(main)
