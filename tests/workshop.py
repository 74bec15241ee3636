"""A tiny model with an adapter, a capsule that fires on two tokens, and steps taken by hand."""

import hashlib
from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model

from kif_runtime import Capsule, Signature
from kif_runtime.bake.examples import Example, collate
from kif_runtime.bake.objectives import Objective, Setup, Step
from kif_runtime.bake.passes import Passes

WIDTH, BLOCKS, SITE = 32, 4, 1
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAME = (20, 21)  # the tokens of the subject's name
REFUSAL = (50, 60, 70)


def capsule(model) -> Capsule:
    """Fires on the name's last token, and there takes two components to 0."""
    with torch.no_grad():
        state = model.model(torch.tensor([[3, *NAME]]), output_hidden_states=True).hidden_states[SITE + 1][0]
    normal = state / state.square().mean(-1, keepdim=True).sqrt()
    detector = normal[-1] - normal[0]
    bias = -(normal[-1] @ detector) * 0.7
    basis = torch.linalg.qr(torch.randn(WIDTH, 2, generator=torch.Generator().manual_seed(1)))[0].T.contiguous()
    calibration = {"asked": 1e-5, "measured": 0.0, "tokens": 100, "recall": 1.0}
    signature = Signature(SITE, "last", detector, bias, basis, torch.zeros(2), torch.tensor(1.0), calibration)
    model_id = hashlib.sha256(b"tiny").hexdigest()
    return Capsule("tiny", (signature,), model_id, WIDTH, BLOCKS, {}, {"kif": "0.1.0"})


def examples(count: int, forget: bool, seed: int) -> list[Example]:
    g = torch.Generator().manual_seed(seed)

    def drawn(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(30, 120, (n,), generator=g).tolist())

    made = []
    for number in range(count):
        prompt = (3, *drawn(1), *NAME) if forget else (3, *drawn(3))
        ids = prompt + drawn(2 + number % 3)
        other = prompt + REFUSAL if forget else None
        made.append(Example(ids, len(prompt), 0 if forget else -1, (2, 3) if forget else (), other))
    return made


class Workshop:
    """What the trainer does, in its plainest form."""

    def __init__(self, model, objective: Objective, learning_rate: float = 1e-2, tokenizer=None) -> None:
        found = capsule(model)
        proposed = objective.settings(SITE, BLOCKS)
        settings = replace(proposed, rank=min(proposed.rank, 8))
        blocks = list(range(settings.blocks)) if settings.blocks is not None else None
        torch.manual_seed(0)
        config = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, target_modules=LINEAR, layers_to_transform=blocks
        )
        self.model = get_peft_model(model, config)
        self.passes = Passes(self.model, [found])
        self.objective = objective
        self.forget, self.retain = examples(6, True, 0), examples(6, False, 1)
        self.adapter = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        layers = {n: m for n, m in self.model.named_modules() if hasattr(m, "lora_A")}
        generator = torch.Generator().manual_seed(0)
        objective.prepare(
            Setup(self.passes, tokenizer, self.forget, self.retain, settings, generator, self.adapter, layers)
        )
        self.optimiser = torch.optim.AdamW(self.adapter.values(), lr=learning_rate)

    def step(self, number: int, rows: slice = slice(None)) -> Step:
        forget, retain = (collate(e[rows], range(len(e))[rows]) for e in (self.forget, self.retain))
        return Step(self.passes, forget, retain, number, 2, torch.Generator().manual_seed(number), self.adapter)

    def train(self, steps: int) -> list[dict[str, float]]:
        log = []
        for number in range(steps):
            step = self.step(number)
            terms = self.objective.loss(step)
            self.optimiser.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            self.optimiser.step()
            self.objective.after(step)
            log.append({name: term.item() for name, term in terms.items()})
        return log
