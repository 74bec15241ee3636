"""The self-healing loop: its criteria, what it measures, and rounds that go on from one another."""

import pytest
import torch

from kif_runtime.bake.continuing import Earlier
from kif_runtime.bake.data import Subject, held_out
from kif_runtime.bake.examples import Example
from kif_runtime.bake.healing import Leakage, bake_until_healed, heal, leakage
from tests.runtime.bake.conftest import NAME

GOOD, NAMED, MORE = Leakage(0.05, 0.1, 0.4), Leakage(0.2, 0.1, 0.4), Leakage(0.0, 0.5, 0.4)


def test_it_ends_when_the_criteria_have_held_often_enough_in_a_row():
    measured, trained = iter([NAMED, GOOD, MORE, GOOD, GOOD, GOOD]), []
    result = heal(trained.append, lambda: next(measured), needed=2, budget=9)
    assert result.healed and trained == [0, 1, 2, 3, 4] and result.rounds[-2:] == (GOOD, GOOD)


def test_the_ratio_counts_and_not_the_mass():
    """A mass of 0.5 is below 1 and still more than before."""
    result = heal(lambda number: None, lambda: MORE, needed=1, budget=3)
    assert not result.healed and len(result.rounds) == 3


@pytest.mark.parametrize("smr, el10, before", [(float("nan"), 0.1, 0.4), (0.0, float("nan"), 0.4), (0.0, 0.0, 0.0)])
def test_what_was_not_measured_does_not_hold(smr, el10, before):
    assert not Leakage(smr, el10, before).holds


@torch.no_grad()
def by_hand(model, ids: list[int], token: int, end: int) -> tuple[list[int], float]:
    """Greedy decoding without a cache: what is said, and the mean probability of `token` over the first ten steps."""
    said, mass = list(ids), []
    for step in range(20):
        probs = model(torch.tensor([said])).logits[0, -1].double().softmax(-1)
        if step < 10:
            mass.append(float(probs[token]))
        said.append(int(probs.argmax()))
        if said[-1] == end:
            break
    return said[len(ids) :], sum(mass) / len(mass)


def test_leakage_is_that_of_greedy_decoding_by_hand(tiny):
    subject = Subject(tiny.capsule, (NAME,))
    token = tiny.tokenizer.convert_tokens_to_ids(NAME)
    rows = [[5, 6, 7], [9, token, 11, 12, 13], [8]]
    expected = [by_hand(tiny.model, row, token, tiny.tokenizer.eos_token_id) for row in rows]
    smr, mass = leakage(tiny.model, tiny.tokenizer, [Example(tuple(r), 0, 0) for r in rows], [subject])
    assert smr == pytest.approx(sum(token in said for said, _ in expected) / 3)
    assert mass == pytest.approx(sum(m for _, m in expected) / 3, rel=1e-4)


def test_a_model_that_says_the_name_is_caught(tiny):
    """The same prompts, the name's logit raised: every answer names it."""
    token = tiny.tokenizer.convert_tokens_to_ids(NAME)
    head = tiny.model.get_output_embeddings()
    raised = head.register_forward_hook(lambda _m, _a, out: out.index_fill(-1, torch.tensor([token]), 50.0))
    try:
        found = leakage(tiny.model, tiny.tokenizer, [Example((5, 6), 0, 0)], [Subject(tiny.capsule, (NAME,))])
    finally:
        raised.remove()
    assert found == (1.0, pytest.approx(1.0))


@pytest.mark.slow
def test_rounds_go_on_from_one_another(tiny, tmp_path):
    settings = {"rank": 2, "alpha": 4.0, "steps": 2, "forget_rows": 2, "retain_rows": 2}
    subject = Subject(tiny.capsule, (NAME,))
    before = {n: p.clone() for n, p in tiny.model.named_parameters()}
    result = bake_until_healed(
        tiny.model, tiny.tokenizer, [subject], tmp_path, needed=3, budget=2, objective="npo", settings=settings
    )
    assert not result.healed and len(result.rounds) == 2  # three in a row need three rounds
    assert all(torch.equal(before[n], p) for n, p in tiny.model.named_parameters())
    ranks = [next(iter(Earlier(tmp_path / f"round-{n}").factors.values()))[0].shape[0] for n in (0, 1)]
    assert ranks == [2, 4]
    prompts, _ = held_out(tiny.tokenizer, [subject])
    assert result.rounds[0].el10_before == pytest.approx(leakage(tiny.model, tiny.tokenizer, prompts, [subject])[1])
