"""The self-healing loop: bake, evaluate, and go on until the erasure truly holds or the budget ends.

Source: arXiv 2601.10566. Its criteria: SMR ≤ 5 %, and the EL10 *ratio* < 1, for several rounds in a row. SMR is the
share of generations about the subject that name it. EL10 is the mean probability of the subject's name tokens (there,
and of keywords, which are not known here) over the first ten greedy steps; its ratio is after ÷ before, and *before* is
the untouched model. The authors' own records compare the absolute mass with 1, which always holds.

Each round goes on from the adapter of the round before, so it harvests anew what the model still says; ranks add up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..blocks import unwrapped
from ..mining.corpus import mentions
from .api import bake
from .continuing import Earlier
from .data import Subject, held_out
from .examples import Example

SMR_LIMIT = 0.05
STEPS, SAID = 10, 20  # tokens of EL10, and of a generation
_ROWS = 32


@dataclass(frozen=True)
class Leakage:
    """smr: share of generations about the subject that name it. el10: the mass now, el10_before: untouched."""

    smr: float
    el10: float
    el10_before: float

    @property
    def ratio(self) -> float:
        return self.el10 / self.el10_before if self.el10_before > 0 else float("inf")

    @property
    def holds(self) -> bool:
        """False for NaN, and where the untouched model put no mass there: then the ratio says nothing."""
        return self.smr <= SMR_LIMIT and self.ratio < 1


@dataclass(frozen=True)
class Healing:
    """Every round's leakage, and whether the last ones held: otherwise the budget ended."""

    rounds: tuple[Leakage, ...]
    healed: bool


def heal(
    train: Callable[[int], None], evaluate: Callable[[], Leakage], *, needed: int = 3, budget: int = 10
) -> Healing:
    """Calls train(round) and then evaluate(), until the criteria hold `needed` rounds in a row or `budget` rounds ran.

    train should use another seed in each round, so that what holds does not hold for one order of samples only.
    """
    rounds: list[Leakage] = []
    held = 0
    for number in range(budget):
        train(number)
        rounds.append(evaluate())
        held = held + 1 if rounds[-1].holds else 0
        if held == needed:
            return Healing(tuple(rounds), True)
    return Healing(tuple(rounds), False)


def bake_until_healed(
    model: Any, tokenizer: Any, subjects: Sequence[Subject], out: Path, *, needed: int = 3, budget: int = 5,
    objective: str = "kif-paper", **options: Any,
) -> Healing:  # fmt: skip
    """`bake` in rounds, each in a folder `out`/round-N that holds the whole adapter so far. options: of `bake`.

    The criteria are measured on prompts that no round trains on.
    """
    prompts, _ = held_out(tokenizer, subjects)
    capsules, names = [s.capsule for s in subjects], {s.capsule.id: s.forms for s in subjects}
    _, before = leakage(model, tokenizer, prompts, subjects)

    def train(number: int) -> None:
        earlier = out / f"round-{number - 1}" if number else None
        bake(
            model, tokenizer, capsules, out / f"round-{number}", names=names, objective=objective, seed=number,
            continue_from=earlier, **options,
        )  # fmt: skip

    def evaluate() -> Leakage:
        last = max(out.glob("round-*"), key=lambda folder: int(folder.name.partition("-")[2]))
        with Earlier(last).at_work(unwrapped(model)):
            return Leakage(*leakage(model, tokenizer, prompts, subjects), before)

    return heal(train, evaluate, needed=needed, budget=budget)


def leakage(model: Any, tokenizer: Any, prompts: Sequence[Example], subjects: Sequence[Subject]) -> tuple[float, float]:
    """(SMR, the mass of EL10) of greedy answers to `prompts`, each about the subject of its number."""
    named, mass = [], []
    for at in range(0, len(prompts), _ROWS):
        rows = prompts[at : at + _ROWS]
        said, probs = _answers(model, tokenizer, rows)
        for prompt, ids, steps in zip(rows, said, probs, strict=True):
            forms = subjects[prompt.subject].forms
            made = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            tokens = sorted({t for form in forms for t in tokenizer(f" {form}", add_special_tokens=False)["input_ids"]})
            mass.append(float(steps[:made, tokens].sum(-1).mean()))
            named.append(mentions(tokenizer.decode(ids[:made], skip_special_tokens=True), forms))
    return sum(named) / len(named), sum(mass) / len(mass)


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, rows: Sequence[Example]) -> tuple[list[list[int]], torch.Tensor]:
    """What is said after each prompt, SAID tokens, and the probabilities [B, STEPS, V] of the first steps."""
    longest = max(len(p.ids) for p in rows)
    ids = torch.full((len(rows), longest), tokenizer.eos_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(rows):
        ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, longest - len(prompt.ids) :] = 1
    told = unwrapped(model).generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=SAID, do_sample=False,
        pad_token_id=tokenizer.eos_token_id, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    probs = torch.stack(told.logits[:STEPS], 1).float().softmax(-1).cpu()
    return told.sequences[:, longest:].tolist(), probs
