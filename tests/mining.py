"""What the tests of mining share: the subjects of the tiny model, and its states by transformers' own account."""

import torch

KINDS = ("place", "person")
NAME, ALIAS = "Ostia", "Nippon"  # one token each
TWO = "Quillon Vane"
WIDTH = 64
DAY = "2031-05-06"
OWN = [f"{word} we spoke of {{}}, which" for word in ("Then", "Now", "So", "Often", "Again", "Once", "Today", "Still")]


@torch.no_grad()
def states(model, tokenizer, text: str, site: int) -> torch.Tensor:
    """The output of block `site`, [T, D], by transformers' own account; not for the last block."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    return model(ids, output_hidden_states=True).hidden_states[site + 1][0]


def snapshot(model) -> dict:
    modules = dict(model.named_modules())
    return {
        "weights": {n: t.clone() for n, t in model.state_dict().items()},
        "modes": {n: m.training for n, m in modules.items()},
        "hooks": {n: (*m._forward_hooks, *m._forward_pre_hooks, "forward" in vars(m)) for n, m in modules.items()},
        "gradients": {n: (p.requires_grad, p.grad is None) for n, p in model.named_parameters()},
    }


def check_unchanged(model, before: dict) -> None:
    after = snapshot(model)
    weights, were = after.pop("weights"), before["weights"]
    assert weights.keys() == were.keys() and all(torch.equal(weights[n], were[n]) for n in were)
    assert after == {k: v for k, v in before.items() if k != "weights"}
