"""The parts of mining against independent mathematics: scikit-learn, scipy, the operator itself."""

import json

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from kif_kernels.suppress import reference
from kif_runtime import CapsuleBank, MiningError
from kif_runtime.calibration import tail_rate
from kif_runtime.mining.corpus import checked_templates, corpus, mentions, near_misses
from kif_runtime.mining.detector import Detector, decide, fisher, fit_tail
from kif_runtime.mining.kinds import discriminants
from kif_runtime.mining.neutral import References, bucketed, divergence, move
from kif_runtime.mining.reading import Prompt
from kif_runtime.mining.repeated import repeated
from kif_runtime.mining.subject import checked_forms
from tests.capsules import capsule, signature

WIDTH = 24


def clouds(seed: int = 0, shift: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=draw)
    negatives = torch.randn(20000, WIDTH, generator=draw) @ mix
    positives = torch.randn(200, WIDTH, generator=draw) @ mix * 0.3 + shift * mix.T @ torch.ones(WIDTH) * 0.5
    return positives, negatives


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / len(x)


def test_without_near_misses_and_rounds_the_direction_is_the_one_scikit_learn_finds(monkeypatch):
    monkeypatch.setattr("kif_runtime.mining.detector.HARD_ROUNDS", 0)
    monkeypatch.setattr("kif_runtime.mining.detector.RIDGE", 0.0)
    positives, negatives = clouds()
    ours = fisher(positives, *moments(negatives), negatives[:0], negatives)
    # Its within-class covariance is ours when every class but the positives' mean is the negatives' cloud.
    data = torch.cat([negatives, negatives + positives.mean(0) - negatives.mean(0)]).double().numpy()
    lda = LinearDiscriminantAnalysis(solver="lsqr").fit(data, np.repeat([0, 1], len(negatives)))
    theirs = torch.tensor(lda.coef_[0])
    assert torch.cosine_similarity(ours.weight.double(), theirs, dim=0) > 0.99999


def test_the_mean_negative_scores_zero_and_the_mean_positive_one():
    positives, negatives = clouds()
    found = fisher(positives, *moments(negatives), negatives[:7], negatives)
    assert found.scores(negatives.mean(0)).item() == pytest.approx(0.0, abs=1e-4)
    assert found.scores(positives.mean(0)).item() == pytest.approx(1.0, abs=1e-4)


def test_near_misses_are_scored_lower_when_the_detector_is_told_of_them():
    positives, negatives = clouds()
    mark = 8 * torch.nn.functional.one_hot(torch.tensor(3), WIDTH)  # what near misses have and the subject has not
    near = positives[:50] * 0.9 + mark
    without = fisher(positives, *moments(negatives), negatives[:0], negatives).scores(near).max()
    told = fisher(positives, *moments(negatives), near, negatives).scores(near).max()
    assert without > 0.5
    assert told < 0.7 * without


@pytest.mark.parametrize("shape", [-0.2, 0.0, 0.25])
def test_the_tail_gives_back_rates_beyond_what_was_counted(shape):
    exact = stats.genpareto(shape, scale=0.4)
    scores = torch.tensor(exact.rvs(60000, random_state=3), dtype=torch.float32)
    tail = fit_tail(scores)
    score = float(exact.isf(1e-5))
    assert 1e-6 < tail_rate(tail, score) < 1e-4


def test_a_threshold_holds_the_asked_rate_on_fresh_negatives_and_keeps_separable_positives():
    positives, negatives = clouds(shift=3.0)
    detector = fisher(positives[:100], *moments(negatives), negatives[:0], negatives)
    decision = decide(detector, positives[100:], negatives, negatives[:0], 1e-4)
    _, fresh = clouds(seed=0)
    assert (decision.detector.scores(fresh) > 0).float().mean() <= 2e-4
    assert decision.calibration["recall"] == 1.0
    json.dumps(decision.calibration)


def test_recall_is_not_given_up_for_a_few_false_fires_but_never_past_the_stated_bound():
    positives = torch.randn(60, 1) * 0.05 + 1
    crowd = torch.cat([torch.randn(40000, 1) * 0.1, torch.ones(1, 1) * 1.4])  # one control text that looks like it
    decision = decide(Detector(torch.ones(1), 0.0), positives, crowd, crowd[:0], 1e-5)
    assert decision.calibration["recall"] == 1.0
    lost = torch.cat([torch.randn(40000, 1) * 0.1, torch.ones(400, 1)])  # a hundredth of the text looks like it
    decision = decide(Detector(torch.ones(1), 0.0), positives, lost, crowd[:0], 1e-5)
    assert (lost > -decision.detector.bias).float().mean() <= 1e-4


def test_the_edit_that_mining_trains_with_is_the_operator_in_float64():
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(2, 6, WIDTH, generator=draw) * 9
    vector, row = torch.linalg.qr(torch.randn(WIDTH, 2, generator=draw)).Q.T
    vector, row, target = vector * 40, row[None], torch.tensor([3.0])
    edited = move(vector, torch.tensor([0, 1]), torch.tensor([4, 2]), row, target)(x)
    everywhere = signature(
        detector=torch.zeros(WIDTH),
        bias=torch.tensor(1.0),
        basis=torch.cat([(vector / vector.norm())[None], row]),
        target=torch.cat([vector.norm()[None], target]),
    )
    bank = CapsuleBank.for_capsules([capsule(signatures=(everywhere,), width=WIDTH)])
    rows, site = torch.full((1,), bank.row(["new-york"]), dtype=torch.int32), bank.site(1)
    for b, t in ((0, 4), (1, 2)):
        expected = reference.suppress(x[b, t][None].double(), rows, site)[0]
        torch.testing.assert_close(edited[b, t].double(), expected, rtol=1e-5, atol=1e-4)
    untouched = torch.ones(2, 6, dtype=torch.bool)
    untouched[0, 4] = untouched[1, 2] = False
    assert torch.equal(edited[untouched], x[untouched])


def test_divergence_is_scipys_relative_entropy_over_the_buckets():
    log_probs = torch.randn(3, 50).log_softmax(-1)
    tokens = torch.stack([torch.randperm(50)[:10] for _ in range(3)])
    rows = bucketed(log_probs, tokens)
    torch.testing.assert_close(rows.exp().sum(1), torch.ones(3))
    prior = torch.rand(3, 11).softmax(-1)
    expected = [stats.entropy(p, q) for p, q in zip(prior.numpy(), rows.exp().numpy(), strict=True)]
    np.testing.assert_allclose(divergence(prior, rows), expected, rtol=1e-4)


def test_the_prior_averages_the_entities_that_answer_otherwise():
    probs = torch.rand(1, 6, 4).softmax(-1)
    known = References(("{} is",), tuple("abcdef"), torch.zeros(1, 3), probs, torch.tensor([[7, 7, 8, 9, 9, 5]]))
    torch.testing.assert_close(known.prior(0, 7), probs[0, 2:].mean(0))
    torch.testing.assert_close(known.prior(0, 7, without=[5]), probs[0, 2:5].mean(0))
    few = References(("{} is",), tuple("abc"), torch.zeros(1, 3), probs[:, :3], torch.tensor([[7, 7, 8]]))
    torch.testing.assert_close(few.prior(0, 7), probs[0, :3].mean(0))  # only one differs: all count


def test_the_corpus_is_whole():
    data = corpus()
    names = [e.name for e in data.entities]
    assert len(names) == len(set(names)) >= 1000
    assert {e.kind for e in data.entities} == set(data.kinds) and len(data.kinds) >= 7
    assert all(t.count("{}") == 1 for lines in data.templates.values() for t in lines)
    assert min(map(len, data.templates.values())) >= 16


def test_near_misses_share_words_with_the_name_and_are_not_it():
    made = near_misses("Windows Server 2003", ["Rose Valley", "Niger"])
    assert {"2003", "Windows Server", "Server 2003", "Windows Server Valley", "Rose 2003", "Niger 2003"} <= set(made)
    assert "Windows Server 2003" not in made
    assert near_misses("Niger", ["Rose Valley"]) == []


def test_text_that_names_the_subject_in_any_case_is_no_negative():
    assert mentions("the capital of JAPAN,", ["Nippon", "Japan"])
    assert not mentions("Jamaica and Japanese", ["Japan"]) and not mentions("a woman in Roman dress", ["Oman"])
    assert mentions("首都は東京です", ["東京"])


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "\x07"])
def test_names_that_cannot_be_mined_are_refused_in_one_line(name):
    with pytest.raises(MiningError, match="name"):
        checked_forms(name, [])


@pytest.mark.parametrize("templates", [["{} is"] * 3, ["{} is"] * 9 + ["no slot"], ["{} and {}"] * 9])
def test_unusable_prompts_are_refused(templates):
    with pytest.raises(MiningError, match="prompt"):
        checked_templates(templates)


@pytest.mark.parametrize("start", ["", "<s>"])
def test_chats_name_the_subject_twice_and_begin_with_what_the_tokenizer_does_not_add(start):
    told = []

    class Chatty:
        chat_template, bos_token, bos_token_id = "given", "<s>", 1

        def __call__(self, text):
            return {"input_ids": [1] if start else []}

        def apply_chat_template(self, turns, *, tokenize, add_generation_prompt):
            told.append((turns, tokenize, add_generation_prompt))
            return f"<s>[{turns[0]['role']}] {turns[0]['content']} [answer] "

    made = repeated(Chatty())
    silent = Chatty()
    silent.chat_template = None
    chats = [text for text in made if text not in repeated(silent)]
    assert len(chats) >= 3 and all(text.count("{}") >= 2 for text in made)
    assert all(text.startswith("[user]" if start else "<s>[user]") for text in chats)
    assert all(len(turns) == 1 and not tokenize and opened for turns, tokenize, opened in told)


def test_each_mention_of_a_template_is_placed():
    first, second = (Prompt.of("Of {}: {} is", "Ann Lee", i) for i in (0, 1))
    assert first.text == second.text == "Of Ann Lee: Ann Lee is"
    assert (first.start, second.start) == (3, 12)


def test_kinds_are_told_by_the_discriminants_that_scikit_learn_finds(monkeypatch):
    monkeypatch.setattr("kif_runtime.mining.kinds._RIDGE", 0.0)
    draw = torch.Generator().manual_seed(0)
    names = ("place", "person", "work")
    number = torch.arange(240) % 3
    mix = torch.randn(5, 5, generator=draw)
    points = torch.randn(240, 5, generator=draw) @ mix + torch.randn(3, 5, generator=draw)[number] * 2
    ours = discriminants(points, [names[i] for i in number], names, site=2)
    lda = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3).fit(points.double().numpy(), number.numpy())
    fresh = torch.randn(50, 5, generator=draw) @ mix
    scores = fresh @ ours.weights.T + ours.bias
    np.testing.assert_allclose(scores.softmax(-1), lda.predict_proba(fresh.double().numpy()), rtol=2e-3, atol=1e-5)


def test_forms_are_trimmed_and_counted_once():
    assert checked_forms(" Japan ", ["Nippon", "Japan"]) == ("Japan", "Nippon")
