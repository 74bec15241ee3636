"""Windows, perplexity and firing, against plain loops over a tiny model."""

import math

import numpy as np
import pytest
import torch
from evaluating import WORDS, capsule_for, tokenizer

from kif_hf import attach
from kif_runtime import KifError
from kif_runtime.evaluation import perplexity
from kif_runtime.evaluation.facts import padded
from kif_runtime.evaluation.firing import fires_on, watching
from kif_runtime.evaluation.text import predicted, sample_text, window_losses

TEXT = "the capital of Arland is Ara .\nthe river in Berland is old .\nit is in New Dorland .\n" * 4


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama", seed=3)


@pytest.fixture(scope="module")
def arland(model):
    return capsule_for(model, "Arland", "arland")


def test_windows_hold_the_text_in_order():
    sample = sample_text(tokenizer(), TEXT, window=8, tokens=40)
    assert sample.ids.shape == sample.paragraph.shape == (5, 8)
    assert [WORDS[i] for i in sample.ids.flatten()] == TEXT.split()[:40]
    assert [sample.paragraphs[i].split()[0] for i in sample.paragraph[0]] == ["the"] * 8
    assert sample.paragraph.flatten().tolist()[:16] == [0] * 7 + [1] * 7 + [2] * 2


def test_short_texts_are_one_window_and_nothing_is_refused():
    assert sample_text(tokenizer(), "the old river", window=64).ids.shape == (1, 3)
    assert sample_text(tokenizer(), TEXT, window=10, tokens=None).ids.shape == (8, 10)
    assert sample_text(tokenizer(), TEXT, window=10, tokens=4).ids.shape == (1, 4)
    for text, window in (("", 8), ("river", 8), (TEXT, 1)):
        with pytest.raises(KifError, match="2"):
            sample_text(tokenizer(), text, window=window)


def test_paragraphs_that_name_the_subject_are_told_apart():
    sample = sample_text(tokenizer(), TEXT, window=10, tokens=20)
    assert sample.naming(["aRLAND"]).flatten().tolist() == [True] * 7 + [False] * 13
    assert sample.naming(["rland", "Ber"]).any().item() is False  # whole words only
    assert sample.naming(["x", "New Dorland", "Arland"]).flatten().tolist() == [True] * 7 + [False] * 7 + [True] * 6
    assert sample.naming([]).any().item() is False


def test_perplexity_is_that_of_one_window_at_a_time(model):
    words = tokenizer()
    ids = torch.tensor(words(TEXT)["input_ids"])[:72].view(6, 12)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in ids:
            logits = model(row[None]).logits[0].double().numpy()
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            total -= sum(log_p[t, row[t + 1]] for t in range(11))
            count += 11
    found = perplexity(model, words, TEXT, window=12, tokens=72)
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)
    assert predicted(ids) == count


def test_windows_do_not_see_each_other(model, monkeypatch):
    ids = sample_text(tokenizer(), TEXT, window=12, tokens=72).ids
    whole = window_losses(model, ids)
    monkeypatch.setattr("kif_runtime.evaluation.text._AT_ONCE", 24)  # two at a time
    seen = []
    assert window_losses(model, ids, progress=lambda *s: seen.append(s)) == pytest.approx(whole, rel=1e-5)
    assert seen == [(2, 6, "text"), (4, 6, "text"), (6, 6, "text")]
    assert window_losses(model, ids[3:4]) == pytest.approx(whole[3:4], rel=1e-5)


def test_firing_is_seen_without_changing_the_model(model, arland):
    sample = sample_text(tokenizer(), TEXT, window=12, tokens=72)
    ids = sample.ids
    with torch.no_grad():
        bare = model(ids).logits
    other = capsule_for(model, "river", "river", site=2)
    with watching(model, [other, arland]) as firing:
        hits = fires_on(model, firing, ids)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, bare)
    assert torch.equal(hits[..., 0], ids == WORDS.index("river"))
    assert torch.equal(hits[..., 1], ids == WORDS.index("Arland"))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, bare)


def test_applied_hooks_do_what_attaching_does(model, arland):
    ids = sample_text(tokenizer(), TEXT, window=12, tokens=72).ids
    with attach(model, [arland]) as kif, torch.no_grad():
        expected = model(ids).logits
    with watching(model, [arland], apply=True) as firing, torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected)
        assert int(firing.hits.sum()) == kif.fired["arland"] > 0
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, expected)


def test_what_fires_on_padding_is_left_out(model, arland):
    words = tokenizer()
    ids, mask = padded([words(t)["input_ids"] for t in ("the Arland", "Arland is in the river of it")])
    ids[mask == 0] = WORDS.index("Arland")
    with watching(model, [arland]) as firing:
        assert fires_on(model, firing, ids, mask)[..., 0].sum(1).tolist() == [1, 1]
        assert fires_on(model, firing, ids)[..., 0].sum(1).tolist() == [6, 1]
