"""Signatures as neurons of the gated MLP."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC

from kif_runtime.bake import neurons
from kif_runtime.bake.adapter import adapted, layers, parameters
from kif_runtime.bake.examples import collate
from kif_runtime.bake.homes import REACH, homes, taken
from kif_runtime.bake.passes import Passes
from kif_runtime.bake.settings import MLP, Settings
from kif_runtime.bake.validation import states
from tests.runtime.bake.conftest import NAME, OTHER, WIDTH

SETTINGS = Settings(rank=4, alpha=8, blocks=2, targets=(MLP,))


def test_the_gate_is_the_support_vector_machine_of_another_library():
    rng = torch.Generator().manual_seed(0)
    fires = torch.rand(400, generator=rng) < 0.1
    x = torch.randn(400, 12, generator=rng) + 1.0 + 1.2 * fires[:, None]
    w = neurons.separating(x, fires, x.T @ x)
    ridge = neurons.RIDGE * float(x.square().mean())
    each = np.where(fires.numpy(), 1.0, neurons.EACH) * 0.5 / int(fires.sum())
    # theirs: ½ |w|² + Σ cᵢ hinge²; ours: ridge |w|² + Σ eachᵢ hinge²
    machine = LinearSVC(C=1.0, loss="squared_hinge", fit_intercept=False, tol=1e-10, max_iter=200_000)
    machine.fit(x.numpy(), fires.numpy(), sample_weight=each / (2 * ridge))
    assert torch.allclose(w, torch.tensor(machine.coef_[0], dtype=torch.float32), atol=2e-3)


@pytest.fixture
def compiled(tiny, data):
    with adapted(tiny.model, SETTINGS, seed=0) as wrapped:
        passes = Passes(wrapped, [tiny.capsule])
        assert neurons.compilable(passes, {1: (1,)})
        assert neurons.compile_capsules(passes, data.forget, data.retain, {1: (1,)}) == 1
        yield passes


def test_the_student_does_what_the_teacher_does(compiled, data):
    ratios = states(compiled, data.held_forget, data.held_retain, 1)  # 1 and 0 before; a random model is hard to tell
    assert ratios["forget"] < 0.3 and ratios["retain"] < 0.5


def test_tokens_other_than_the_name_stay_close_to_what_they_were(compiled, tiny, data):
    batch = collate(data.retain[:32], range(32))
    with torch.no_grad():
        moved = compiled.student(batch, hidden=[1]).hidden[1] - compiled.reference(batch, hidden=[1]).hidden[1]
        size = compiled.reference(batch, hidden=[1]).hidden[1].norm(dim=-1)
    assert float((moved.norm(dim=-1) / size)[batch.mask.bool()].median()) < 0.02


def test_one_rank_is_one_neuron(compiled):
    for path, layer in layers(compiled.model).items():
        change = layer.get_delta_weight("default").detach()
        if "layers.1." not in path:
            assert float(change.abs().max()) == 0
            continue
        rows = change.abs().amax(0 if "down" in path else 1)
        assert int((rows > 0).sum()) == 1


def test_later_subjects_take_other_neurons(tiny, data, compiled):
    changes = {p.removeprefix("base_model.model."): m.get_delta_weight("default").clone()
               for p, m in layers(compiled.model).items()}  # fmt: skip
    found = taken(compiled.model, changes.get)
    assert {block: int(mask.sum()) for block, mask in found.items()} == {0: 0, 1: 1}  # the adapter is on these two
    first = int(found[1].nonzero())
    free = neurons._least_used(
        {name: getattr(compiled.blocks[1].mlp, name) for name in (neurons.GATE, neurons.UP, neurons.DOWN)},
        torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)), torch.nn.functional.silu, found[1],
    )  # fmt: skip
    assert int(free[-1]) == first


def test_two_subjects_are_two_neurons(tiny, data):
    from kif_runtime.bake.data import Subject, gathered

    both = gathered(tiny.tokenizer, [Subject(tiny.capsules[n], (n,)) for n in (NAME, OTHER)])
    with adapted(tiny.model, SETTINGS, seed=0) as wrapped:
        passes = Passes(wrapped, list(tiny.capsules.values()))
        assert neurons.compile_capsules(passes, both.forget, both.retain, {1: (1, 1)}) == 2
        assert states(passes, both.held_forget, both.held_retain, 1)["forget"] < 0.6


def test_a_signature_is_written_into_a_later_block_too(tiny, data):
    with adapted(tiny.model, dataclasses.replace(SETTINGS, blocks=3), seed=0) as wrapped:
        passes = Passes(wrapped, [tiny.capsule])
        assert neurons.compile_capsules(passes, data.forget, data.retain, {1: (2,)}) == 1
        assert states(passes, data.held_forget, data.held_retain, 2)["forget"] < 0.5
        changed = {
            path: float(m.get_delta_weight("default").detach().abs().max()) for path, m in layers(wrapped).items()
        }
        assert all((change > 0) == ("layers.2." in path) for path, change in changed.items())


def test_what_one_home_has_done_the_next_does_not_do_again(tiny, data):
    """Two signatures for the same token, one written a block after the other: together as one alone."""
    capsule = dataclasses.replace(tiny.capsule, signatures=tiny.capsule.signatures * 2)
    with adapted(tiny.model, dataclasses.replace(SETTINGS, blocks=3), seed=0) as wrapped:
        passes = Passes(wrapped, [capsule])
        assert neurons.compile_capsules(passes, data.forget, data.retain, {1: (1, 2)}) == 2
        assert states(passes, data.held_forget, data.held_retain, 2)["forget"] < 0.5


def test_the_first_signature_lives_at_its_site_and_many_spread_evenly():
    assert homes({1: 1, 3: 2}, 30) == {1: (1,), 3: (3, 4)}
    many = homes({1: 28, 3: 28}, 30)
    load = [sum(own.count(block) for own in many.values()) for block in range(30)]
    assert sum(load) == 56 and load[0] == 0 and not any(load[3 + REACH :])
    assert max(load) - min(load[3 : 3 + REACH]) <= 1 and min(load[1:3]) == 2
    assert homes({2: 9}, 3) == {2: (2,) * 9}  # there is no later block


def test_homes_make_room_for_what_an_earlier_adapter_took():
    assert homes({1: 1}, 4, {1: torch.arange(64) < 1}) == {1: (2,)}


def written(tiny, data, *signatures):
    """How many neurons of each block a capsule with these signatures becomes."""
    capsule = dataclasses.replace(tiny.capsule, signatures=signatures)
    with adapted(tiny.model, SETTINGS, seed=0) as wrapped:
        passes = Passes(wrapped, [capsule])
        own = {site: (site,) * len(capsule.by_site(site)) for site in passes.sites}
        neurons.compile_capsules(passes, data.forget, data.retain, own)
        changed = [(path, m.get_delta_weight("default")) for path, m in layers(wrapped).items() if "gate" in path]
        return [int((change.abs().amax(1) > 0).sum()) for _, change in sorted(changed, key=lambda c: c[0])]


def test_each_signature_is_a_neuron_at_its_site(tiny, data):
    assert written(tiny, data, *tiny.capsule.signatures, *tiny.capsule.signatures) == [0, 2]


def test_a_signature_that_never_fires_takes_no_neuron(tiny, data):
    (only,) = tiny.capsule.signatures
    deaf = dataclasses.replace(only, bias=only.bias - 1e6)
    assert written(tiny, data, only, deaf) == [0, 1]
    # the early one moves the very token that the other would have recognised
    assert written(tiny, data, *tiny.early.signatures, only) == [1, 0]


def test_signatures_of_one_home_that_fire_on_the_same_token_share_what_is_missing(tiny, data):
    """Twice the same one is together as one alone, and what each of three that overlap adds sums up."""
    capsule = dataclasses.replace(tiny.capsule, signatures=tiny.capsule.signatures * 2)
    with adapted(tiny.model, SETTINGS, seed=0) as wrapped:
        passes = Passes(wrapped, [capsule])
        assert neurons.compile_capsules(passes, data.forget, data.retain, {1: (1, 1)}) == 2
        assert states(passes, data.held_forget, data.held_retain, 1)["forget"] < 0.3
    fires = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 0, 1], [0, 0, 0, 1, 0]], dtype=torch.bool)
    own = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(neurons._added(fires, fires.T.float() @ own), own, atol=1e-4)


def test_only_gated_mlps_that_wear_the_lora_are_compilable(tiny_model, tiny):
    with adapted(tiny_model("gpt2"), Settings(rank=2), seed=0) as wrapped:
        assert not neurons.compilable(Passes(wrapped, []), {1: (1,)})
        assert parameters(wrapped)
    for changes, told in (({}, True), ({"blocks": 1}, False), ({"targets": ("attention",)}, False)):
        with adapted(tiny.model, dataclasses.replace(SETTINGS, **changes), seed=0) as wrapped:
            assert neurons.compilable(Passes(wrapped, []), {1: (1,)}) == told
