"""Every registered objective at work on a tiny model: its start, its steps, its independence of how rows are split."""

import math

import pytest
import torch
from workshop import SITE, Workshop, examples

from kif_runtime import BakingError
from kif_runtime.bake.examples import collate
from kif_runtime.bake.objectives import OBJECTIVES, objective
from kif_runtime.bake.objectives.kif_paper import differ, telling_tokens

CLOSED = {"orthogonal", "unierase"}
TRAINED = sorted(set(OBJECTIVES) - CLOSED - {"capsule"})  # capsule has tests of its own
# retain terms that are a distance from the untouched model
HELD = {"kif-paper": "anchors"}


@pytest.fixture(scope="module")
def workshop(tiny_model):
    return lambda name, **options: Workshop(tiny_model("llama"), objective(name, **options))


@pytest.fixture(scope="module", params=TRAINED)
def shop(request, workshop):
    """One workshop for each objective; the three tests that use it come in this order."""
    return workshop(request.param)


def test_what_holds_retain_text_is_silent_at_the_start(shop):
    terms = shop.objective.loss(shop.step(0))
    term = HELD.get(shop.objective.name, "retain")
    if term not in terms:
        assert shop.objective.name in {"gradient-ascent", "undial"}  # they hold nothing
        return
    assert terms[term].item() == pytest.approx(0, abs=1e-6)
    slopes = torch.autograd.grad(terms[term], list(shop.adapter.values()), allow_unused=True)
    assert all(slope is None or slope.abs().max() < 1e-4 for slope in slopes)


def test_two_steps_are_finite_and_move_the_adapter(shop):
    before = {n: p.detach().clone() for n, p in shop.adapter.items()}
    log = shop.train(2)
    assert all(math.isfinite(value) for terms in log for value in terms.values())
    assert any(not torch.equal(before[n], p) for n, p in shop.adapter.items())


def test_a_step_means_the_same_however_its_rows_are_split(shop):
    """Means over halves average to the mean over all rows, so micro-batches and processes change nothing."""
    with torch.no_grad():
        whole = shop.objective.loss(shop.step(1))
        halves = [shop.objective.loss(shop.step(1, rows)) for rows in (slice(0, 3), slice(3, 6))]
    for term, value in whole.items():
        assert (halves[0][term] + halves[1][term]).item() / 2 == pytest.approx(value.item(), rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradient-ascent", "gradient-difference", "npo", "undial", "kif-paper", "dpo"])
def test_the_answer_becomes_unlikely(workshop, name):
    shop = workshop(name)
    batch = collate(shop.forget, range(6))

    def likelihood() -> float:
        from kif_runtime.bake.objectives.tokens import mean_log_prob

        with torch.no_grad():
            return float(
                mean_log_prob(shop.passes.student(batch, logits=True).logits, batch.ids, batch.completion).mean()
            )

    before = likelihood()
    shop.train(8)
    assert likelihood() < before - 0.02


@pytest.mark.parametrize("name", ["rmu", "srmu"])
def test_forget_states_approach_the_target_while_retain_states_stay(workshop, name):
    shop = workshop(name, retain=10.0)
    log = shop.train(12)
    assert log[-1]["forget"] < 0.9 * log[0]["forget"]
    assert log[-1]["retain"] < log[0]["forget"]


def test_noise_reaches_the_retain_reference_alone(workshop):
    quiet, loud = workshop("rmu"), workshop("rmu", rna=0.5)
    calm, noisy = (shop.objective.loss(shop.step(0)) for shop in (quiet, loud))
    assert calm["retain"] == 0 and noisy["forget"] == calm["forget"]
    block = loud.objective.inner.block
    assert block == SITE
    expected = 1200 * loud.objective.deviation**2  # the mean square of δ is ν
    assert noisy["retain"].item() == pytest.approx(expected, rel=0.2)
    again = loud.objective.loss(loud.step(0))
    assert again["retain"] == noisy["retain"]  # the step's generator decides


def test_noise_combines_with_every_objective_that_asks_the_reference(workshop):
    for name in ("npo", "kif-paper"):
        calm, noisy = (workshop(name, rna=share).train(1)[0] for share in (0.0, 0.3))
        changed = {term for term in calm if calm[term] != noisy[term]}
        assert changed == {HELD.get(name, "retain")} and all(math.isfinite(value) for value in noisy.values()), name


def test_reglu_begins_with_orthonormal_directions_and_the_untouched_model(workshop):
    shop = workshop("reglu")
    batch = collate(shop.retain, range(6))
    b = next(p for n, p in shop.adapter.items() if "lora_B" in n)
    torch.testing.assert_close(b.T @ b, torch.eye(b.shape[1]), atol=1e-5, rtol=0)
    with torch.no_grad():
        student, reference = shop.passes.student(batch, logits=True), shop.passes.reference(batch, logits=True)
    assert torch.equal(student.logits, reference.logits)


def test_reglu_s_step_takes_its_share_of_the_outputs_away(workshop):
    shop = workshop("reglu", step=1.0)
    layer = next(m for n, m in shop.model.named_modules() if n.endswith("layers.0.self_attn.o_proj"))
    b = layer.lora_B["default"].weight
    after = layer.get_base_layer().weight + layer.get_delta_weight("default")
    assert (b.T @ after).abs().max() < 1e-6


def test_orthogonalised_outputs_have_nothing_along_the_capsule_s_direction(workshop):
    shop = workshop("orthogonal")
    u = shop.passes.capsules[0].signatures[-1].basis[-1]
    writers = [m for n, m in shop.model.named_modules() if n.endswith(("o_proj", "down_proj")) and hasattr(m, "lora_A")]
    assert len(writers) == 8
    for layer in writers:
        before = layer.get_base_layer().weight
        after = before + layer.get_delta_weight("default")
        assert (u @ before).abs().max() > 1e-3 and (u @ after).abs().max() < 1e-6
    batch = collate(shop.retain, range(6))
    with torch.no_grad():
        start = shop.passes.student(batch, hidden=(0, 3)).hidden
        embedded = shop.model.get_input_embeddings()(batch.ids)
    torch.testing.assert_close(start[3] @ u, embedded @ u, atol=1e-5, rtol=1e-4)  # only the embedding wrote along u


def test_pairs_whose_answers_are_the_same_teach_nothing():
    made = examples(3, True, 0)
    batch = collate(made, range(3))
    assert differ(batch, batch.alternative).tolist() == [1, 1, 1]
    assert differ(batch, batch).tolist() == [0, 0, 0]


def test_name_tokens_that_other_text_has_are_not_forbidden():
    forget, retain = examples(2, True, 0), examples(2, False, 1)
    assert telling_tokens(forget, retain) == {0: frozenset({20, 21})}
    with_21 = type(retain[0])((3, 21, 40), 1)
    assert telling_tokens(forget, [*retain, with_21]) == {0: frozenset({20})}
    assert telling_tokens(forget, [*retain * 20, with_21]) == {0: frozenset({20, 21})}  # one text in 41


def test_refusals_say_what_is_wrong(workshop):
    with pytest.raises(BakingError, match="held='mse' is not a way to hold retain text"):
        objective("npo", held="mse")
    with pytest.raises(BakingError, match="alternatives='own' is not known"):
        objective("kif-paper", alternatives="own")
    shop = workshop("dpo")
    bare = collate([type(e)(e.ids, e.start, e.subject, e.name) for e in shop.forget], range(6))
    step = shop.step(0)
    with pytest.raises(BakingError, match="the forget examples have only one"):
        shop.objective.loss(type(step)(**vars(step) | {"forget": bare}))
