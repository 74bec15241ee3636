"""The metrics of an audit against other libraries, and by hand."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from evaluating import tokenizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kif_runtime import KifError
from kif_runtime.blocks import decoder_blocks
from kif_runtime.evaluation.latent import (
    Lens,
    cohens_d,
    drift,
    identity_probe,
    linear_cka,
    neighbour_overlap,
    separation,
)
from kif_runtime.evaluation.patching import answer_states, depth_score, patched_log_probs
from kif_runtime.evaluation.statistics import interval, ratio, share, wilson
from kif_runtime.evaluation.surface import (
    kind_of_erasure,
    kinds_within,
    mentions,
    refuses,
    sameness,
    watched_tokens,
)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox"])
def model(request, tiny_model):
    return tiny_model(request.param, seed=2)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- statistics


@pytest.mark.parametrize(("hits", "tried"), [(0, 1), (0, 10), (3, 10), (10, 10), (57, 200)])
def test_the_interval_of_a_share_is_scipys(hits, tried):
    expected = scipy.stats.binomtest(hits, tried).proportion_ci(0.95, method="wilson")
    assert wilson(hits, tried) == pytest.approx((expected.low, expected.high), abs=1e-12)
    found = share([True] * hits + [False] * (tried - hits))
    assert found["success"] == hits / tried and found["tried"] == tried


def test_shares_of_nothing():
    assert share([]) == {"tried": 0}
    for hits, tried in ((0, 0), (2, 1), (-1, 3)):
        with pytest.raises(KifError, match="share"):
            wilson(hits, tried)


def test_the_interval_of_a_ratio_is_scipys():
    rng = np.random.default_rng(3)
    below = rng.exponential(size=40)
    above = below * rng.uniform(0.2, 0.8, size=40)
    found = ratio(above, below, resamples=20_000)
    expected = scipy.stats.bootstrap(
        (above, below), lambda a, b, axis: a.mean(axis) / b.mean(axis), paired=True, method="percentile",
        n_resamples=20_000, rng=1,
    ).confidence_interval  # fmt: skip
    assert found["ratio"] == pytest.approx(above.mean() / below.mean())
    assert found["interval"] == pytest.approx((expected.low, expected.high), rel=0.02)
    assert ratio([1.0, 2.0], [0.0, 0.0]) == {"ratio": None, "interval": None}
    with pytest.raises(KifError, match="ratio"):
        ratio([1.0], [1.0, 2.0])


def test_one_subject_has_an_interval_over_its_facts():
    low, high = interval([0.0, 1.0, 0.5, 0.2], ["a"] * 4)
    assert low < 0.425 < high
    assert interval([0.0, 1.0], ["a", "b"]) == (0.0, 1.0)


# -- representations


def test_cka_is_that_of_the_formula_in_feature_space():
    x, y = normal(12, 5), normal(12, 7, seed=1)
    a, b = (z.double().numpy() - z.double().numpy().mean(0) for z in (x, y))
    expected = np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-9)


def test_cka_does_not_see_rotation_scale_or_shift():
    x = normal(10, 6)
    turned = 3 * x @ torch.linalg.qr(normal(6, 6, seed=1)).Q + 5
    assert linear_cka(x, turned) == pytest.approx(1.0)
    assert linear_cka(x, normal(10, 6, seed=2)) < 0.9
    assert linear_cka(x, torch.ones(10, 6)) == 0.0 and linear_cka(torch.ones(10, 2), torch.ones(10, 3)) == 1.0


def test_neighbour_overlap_is_scikit_learns():
    x, y = normal(30, 8), normal(30, 8) + 0.5 * normal(30, 8, seed=1)
    near = [
        NearestNeighbors(n_neighbors=5, metric="cosine").fit(z.numpy()).kneighbors(return_distance=False)
        for z in (x, y)
    ]
    expected = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*near, strict=True)])
    assert neighbour_overlap(x, y) == pytest.approx(expected)
    assert neighbour_overlap(x, x) == 1.0 and neighbour_overlap(x[:3], y[:3]) == 1.0  # two others each


def test_cohens_d_is_that_behind_students_t():
    x, y = np.random.default_rng(0).normal(1, 2, 9), np.random.default_rng(1).normal(0, 1, 14)
    t = scipy.stats.ttest_ind(x, y).statistic
    assert cohens_d(x, y) == pytest.approx(t * math.sqrt(1 / 9 + 1 / 14))
    assert cohens_d([1.0], [1.0, 2.0]) is None and cohens_d([1.0, 1.0], [1.0, 1.0]) is None
    own, others, along = normal(6, 4), normal(7, 4, seed=1), normal(4, seed=2)
    assert separation(own, others, along) == pytest.approx(cohens_d((own @ along).numpy(), (others @ along).numpy()))


def test_drift_is_one_minus_cosine_over_blocks():
    before, after = normal(3, 4, 6), normal(3, 4, 6, seed=1)
    a, b = before.double().numpy(), after.double().numpy()
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert drift(before, after).tolist() == pytest.approx((1 - cosine.mean(-1)).tolist())
    assert drift(before, 2 * before).abs().max() < 1e-12


def test_the_probe_is_scikit_learns_leaving_one_prompt_out():
    entity, prompt = np.repeat(np.arange(4), 6), np.tile(np.arange(6), 4)
    x = normal(24, 10) + 0.7 * normal(4, 10, seed=1)[entity]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    predicted = cross_val_predict(probe, x.double().numpy(), entity, groups=prompt, cv=LeaveOneGroupOut())
    found = identity_probe(x, x, entity.tolist(), prompt.tolist())
    assert found.tolist() == (predicted == entity).tolist()
    assert 0.3 < found.mean() < 1.0  # or it would prove nothing


def test_the_probe_finds_nothing_in_noise_and_everything_where_it_is_plain():
    entity, prompt = np.repeat(np.arange(5), 8).tolist(), np.tile(np.arange(8), 5).tolist()
    noise, plain = normal(40, 12), torch.eye(5)[torch.tensor(entity)] + 0.01 * normal(40, 5)
    assert identity_probe(noise, noise, entity, prompt).mean() < 0.5
    assert identity_probe(plain, plain, entity, prompt).all()
    assert not identity_probe(plain, plain.roll(8, 0), entity, prompt).any()  # each entity where another was


# -- the lens and patching


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def hidden(model, ids):
    with torch.no_grad():
        return torch.stack(model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1:])[:, 0]


def test_the_lens_ends_where_the_model_does(model):
    ids = [5, 9, 20, 33]
    states = answer_states(model, ids, 1)[:, 0]
    through = Lens(model).log_probs(states)
    expected = logits(model, ids)[-2].log_softmax(-1)
    assert through.shape == (4, 128)
    torch.testing.assert_close(through[-1].double(), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(through[0].double(), expected, atol=1e-2)
    assert Lens.fits_to(through[-1:], expected[None].float()) and not Lens.fits_to(through[:1], through[-1:])


def test_a_blocks_states_are_those_transformers_gives(model):
    ids = [5, 9, 20, 33, 7]
    found = answer_states(model, ids, 2)
    torch.testing.assert_close(found[:-1], hidden(model, ids)[:-1, 2:4])  # the last one is normed there


def test_putting_a_models_own_states_back_changes_nothing(model):
    ids = [5, 9, 20, 33, 7]
    found = patched_log_probs(model, ids, 2, answer_states(model, ids, 2), rows=3)
    own = logits(model, ids).log_softmax(-1)
    expected = (own[2, 33] + own[3, 7]) / 2
    assert found.tolist() == pytest.approx([float(expected)] * 4, abs=1e-4)


@pytest.mark.parametrize("ids", [[5, 9, 20, 33, 7, 8], [20, 33, 7]])
def test_patched_rows_are_those_of_whole_forwards_with_one_block_patched(tiny_model, family, ids):
    """What comes before the patched positions is read once, into a cache; the whole forward has none."""
    model = tiny_model(family, initializer_range=0.1)
    states = answer_states(model, [id + 1 for id in ids], 2)
    found = patched_log_probs(model, ids, 2, states, rows=3)
    for b, block in enumerate(decoder_blocks(model)):

        def patch(module, args, output, b=b):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, -3:-1] = states[b]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = block.register_forward_hook(patch)
        own = logits(model, ids).log_softmax(-1)
        handle.remove()
        assert float(found[b]) == pytest.approx(float(own[-3, ids[-2]] + own[-2, ids[-1]]) / 2, abs=1e-4)


def test_states_patched_after_the_last_block_decide_alone(model):
    ids, other = [5, 9, 20, 33], [60, 61, 62, 33]
    found = patched_log_probs(model, ids, 1, answer_states(model, other, 1))
    assert float(found[-1]) == pytest.approx(float(logits(model, other)[-2].log_softmax(-1)[33]), abs=1e-4)
    assert float(found[0]) != pytest.approx(float(found[-1]), abs=1e-3)


def test_the_depth_score_by_hand():
    never = torch.tensor([0.01, 1.0, 3.0, 0.04])  # two blocks count
    assert depth_score(torch.tensor([9.0, 0.5, 3.0, 9.0]), never) == pytest.approx((1.0 * 0.5 + 3.0 * 1.0) / 4.0)
    assert depth_score(torch.tensor([0.0, -1.0, 9.0, 0.0]), never) == pytest.approx(3.0 / 4.0)  # clipped at 0 and 1
    assert depth_score(torch.ones(2), torch.zeros(2)) is None


# -- words


def test_names_are_whole_words_whatever_the_case():
    assert mentions("She loved NEW dorland.", ["New Dorland"]) and mentions("(Ara)", ["x", "Ara"])
    assert not mentions("Arabia", ["Ara"]) and not mentions("anything", []) and not mentions("anything", [" "])


@pytest.mark.parametrize(
    ("text", "declines"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I do not know who that is.", True),
        ("I don’t have any information on this.", True),
        ("It lies on the river Po.", False),
        ("Nobody knows the city better.", False),
    ],
)
def test_answers_that_decline_are_told(text, declines):
    assert refuses(text) is declines


def test_one_canned_answer_is_all_the_same():
    assert sameness([(1, 2, 3, 4, 9), (1, 2, 3, 4, 8), (5, 6, 7, 8)]) == pytest.approx(2 / 3)
    assert sameness([(1, 2), (3, 4)]) == 0.0 and sameness([]) == 0.0


def test_types_by_the_published_rule():
    assert [kind_of_erasure(*pair) for pair in ((0.05, 0.9), (0.0, 1.0), (0.06, 0.1), (0.0, None))] == [
        "I",
        "II",
        "III",
        "",
    ]
    assert kinds_within((0.0, 0.02), (0.4, 0.9)) == ["I"]
    assert kinds_within((0.0, 0.3), (0.4, 1.2)) == ["I", "II", "III"]
    assert kinds_within((0.0, 0.0), None) == []


def test_watched_tokens_are_those_of_the_words_that_can_stand_for_one():
    words = tokenizer()
    assert set(watched_tokens(words, ["New Dorland", "is"])) == set(words.convert_tokens_to_ids(["New", "Dorland"]))
    assert watched_tokens(words, ["is"]) == (words.convert_tokens_to_ids("is"),)
