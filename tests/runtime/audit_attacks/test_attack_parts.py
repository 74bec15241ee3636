"""The parts of attacks against definitions: rounding, code books, dictionaries, directions, candidates."""

import copy

import pytest
import torch
from attacking import FACTS, OTHERS, fresh, knowing, never_knew
from auditing import tokenizer

from kif_runtime import KifError
from kif_runtime.evaluation.attacks import ask, extraction, quantisation, restoration, sae, weights

NF4 = (  # as printed in QLoRA (arXiv 2305.14314), appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def test_nf4_levels_are_the_published_ones():
    assert quantisation.nf4_levels().tolist() == pytest.approx(NF4, abs=1e-6)


@pytest.mark.parametrize("scheme", quantisation.GROUPS)
def test_round_trips_take_the_nearest_level_of_each_group(scheme):
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 200, generator=rng) * torch.tensor([[1.0], [1e-4], [0.0]])
    got = quantisation.round_trip(weight, scheme)
    size = quantisation.GROUPS[scheme]
    steps = {"int8": torch.arange(-127, 128) / 127, "int4": torch.arange(-7, 8) / 7, "nf4": torch.tensor(NF4)}[scheme]
    for row in range(3):
        for start in range(0, 200, size):
            group = weight[row, start : start + size].double()
            levels = steps.double() * group.abs().max()
            nearest = levels[(group[:, None] - levels).abs().argmin(1)]
            assert torch.allclose(got[row, start : start + size].double(), nearest, rtol=1e-5, atol=1e-12)
    assert got.dtype == weight.dtype and torch.equal(quantisation.round_trip(got, scheme), got)


def test_an_edit_of_less_than_half_a_step_rounds_away():
    weight = torch.tensor([[1.0, 3 / 7, -5 / 7, 0.0]])
    edited = weight + torch.tensor([[0.0, 0.06, -0.06, 0.03]])
    assert not torch.equal(edited, weight)
    assert torch.equal(quantisation.round_trip(edited, "int4"), quantisation.round_trip(weight, "int4"))


def test_quantised_changes_linear_layers_of_blocks_and_nothing_else():
    model = fresh()
    before = copy.deepcopy(model.state_dict())
    with quantisation.quantised(model, "nf4"):
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        inside = copy.deepcopy(model.state_dict())
    expected = {n for n in before if ".layers." in n and n.endswith("proj.weight")}
    assert changed == expected
    for name in expected:
        assert torch.equal(inside[name], quantisation.round_trip(before[name], "nf4"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(KifError, match="int3"), quantisation.quantised(model, "int3"):
        pass


def test_an_adapter_is_merged_before_rounding_and_taken_out_again():
    peft = pytest.importorskip("peft")
    base = fresh()
    bits = {n: v.clone() for n, v in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    layer = base.model.layers[0].self_attn.q_proj
    whole = layer.base_layer.weight + layer.get_delta_weight("default")
    with torch.no_grad():
        unquantised = model(torch.tensor([[3, 4, 5]])).logits
    with quantisation.quantised(model, "int8"):
        assert torch.allclose(layer.base_layer.weight, quantisation.round_trip(whole, "int8"), atol=1e-6)
    assert torch.equal(layer.base_layer.weight, bits["model.layers.0.self_attn.q_proj.weight"])
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([[3, 4, 5]])).logits, unquantised)
    with model.disable_adapter(), quantisation.quantised(model, "int8"):
        own = quantisation.round_trip(bits["model.layers.0.self_attn.q_proj.weight"], "int8")
        assert torch.equal(layer.base_layer.weight, own)


def test_edits_come_after_the_block_and_go_with_the_block():
    model, ids = fresh(), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        plain = model(ids, output_hidden_states=True)
        with weights.edited(model, {2: lambda hidden: hidden * 0 + 1.0}):
            edited = model(ids).logits
        ones = torch.ones(1, 3, 48)
        assert torch.allclose(edited, model.lm_head(model.model.norm(ones)), atol=1e-6)
        assert torch.equal(model(ids).logits, plain.logits)
    states = weights.site_states(model, ids, torch.ones_like(ids), [0, 1])
    assert all(torch.equal(states[site], plain.hidden_states[site + 1]) for site in (0, 1))


def test_a_sparse_autoencoder_finds_the_directions_that_states_are_made_of():
    rng = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(12, 24, generator=rng), dim=1)
    used = torch.rand(4000, 12, generator=rng) < 0.12
    states = (used * (1 + torch.rand(4000, 12, generator=rng))) @ atoms + 3.0
    found = sae.train_sae(states, features=24, k=3, steps=400, rate=5e-3)
    assert found.unexplained(states) < 0.1
    assert torch.allclose(found.decoder.norm(dim=1), torch.ones(24), atol=1e-5)
    alike = (found.decoder @ atoms.T).abs().amax(0)
    assert (alike > 0.9).sum() >= 10
    with_first = used[:, 0]
    (telling,) = restoration.telling_features(found, states[with_first], states[~with_first], 1)
    assert abs(float(found.decoder[telling] @ atoms[0])) > 0.9
    assert (found.features(states) > 0).sum(1).max() <= 3


def projected(site, basis):
    """The knowing model with a subspace removed at one site, as a gate or a bake would."""
    return weights.edited(knowing(), {site: lambda h: h - (h @ basis.T) @ basis})


@pytest.fixture(scope="module")
def removed():
    """(site, basis): how the states from the town's name on differ from those of other towns in the same sentence."""
    site, rows = 0, []
    for fact in FACTS:
        alike = [other for other in OTHERS if other.relation == fact.relation]
        start = restoration.name_start(tokenizer(), fact)
        own, *others = (
            one[site][start:] for one in restoration.prompt_states(knowing(), tokenizer(), [fact, *alike], [site])
        )
        rows.append(own - torch.stack(others).mean(0))
    return site, torch.linalg.svd(torch.cat(rows), full_matrices=False).Vh


@pytest.mark.slow  # the tiny models learn their facts first
def test_what_a_projection_took_away_comes_back_when_it_is_put_back(removed):
    site, basis = removed
    own = restoration.prompt_states(knowing(), tokenizer(), FACTS, [site])
    with projected(site, basis):
        hidden = ask(knowing(), tokenizer(), FACTS)
        found = restoration.restore_directions(knowing(), tokenizer(), FACTS, untouched=own, bases={site: basis})
    assert sum(one.probability for one in hidden) / 3 < 0.3
    assert found.share()["success"] == 1.0
    wrong = torch.linalg.qr(torch.randn(48, 3, generator=torch.Generator().manual_seed(1))).Q.T
    with projected(site, basis):
        other = restoration.restore_directions(knowing(), tokenizer(), FACTS, untouched=own, bases={site: wrong})
    assert sum(other.probabilities) < sum(found.probabilities) / 2
    ignorant = restoration.restore_directions(never_knew(), tokenizer(), FACTS, untouched=own, bases={site: basis})
    assert ignorant.share()["success"] <= 1 / 3


@pytest.mark.slow  # the tiny models learn their facts first
def test_features_that_are_all_put_back_restore_the_state_as_far_as_they_explain_it(removed):
    site, basis = removed
    own = restoration.prompt_states(knowing(), tokenizer(), FACTS, [site])
    states = torch.cat([one[site] for one in own])
    dictionary = sae.train_sae(states.repeat(20, 1), features=96, k=24, steps=300, rate=5e-3)
    assert dictionary.unexplained(states) < 0.05
    with projected(site, basis):
        found = restoration.restore_features(
            knowing(), tokenizer(), FACTS, untouched=own, site=site, sae=dictionary, features=range(96)
        )
        none = restoration.restore_features(
            knowing(), tokenizer(), FACTS, untouched=own, site=site, sae=dictionary, features=[0]
        )
    assert sum(found.probabilities) / 3 > 0.5 > sum(none.probabilities) / 3


def test_the_name_is_found_by_its_letters():
    words = tokenizer()(FACTS[0].prompt)["input_ids"]
    start = restoration.name_start(tokenizer(), FACTS[0])
    assert tokenizer().decode([words[start]]) == FACTS[0].subject


def test_candidates_are_those_of_the_logit_lens():
    model, fact = fresh(), FACTS[0]
    ids = torch.tensor([tokenizer()(fact.prompt)["input_ids"]])
    kept = []
    handles = [block.register_forward_hook(lambda m, a, out: kept.append(out)) for block in model.model.layers]
    with torch.no_grad():
        model(ids)
        rows = torch.stack([model.lm_head(model.model.norm(h[0, -1])).softmax(-1) for h in kept])
    for handle in handles:
        handle.remove()
    wanted = tokenizer().convert_tokens_to_ids(fact.answer)
    for k in (1, 2, 5):
        own = {int(i) for row in rows for i in [*row.argsort()[:k], *row.argsort()[-k:]]}
        assert extraction.candidates(rows, k) == own
        found = extraction.head_projection(model, tokenizer(), [fact], k=k)
        assert found.hits == (wanted in own,) and found.budget == {"candidates": 2 * k * 3}
    steps = rows[1:] - rows[:-1]
    rises = {int(i) for row in steps for i in [row.argmax(), row.argmin()]}
    assert extraction.probability_delta(model, tokenizer(), [fact], k=1).hits == (wanted in rises,)
