"""The small TOFU: training that survives a kill, who is in which model, and the whole run on a tiny model."""

import argparse
import copy
import json

import pytest
import torch
from evaluating import WORDS, tokenizer

from kif_runtime import KifError
from kif_runtime.evaluation.tofu_sets import Item

TOWNS = ("Arland", "Berland", "Corland")


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama", seed=4, vocab_size=len(WORDS))


ITEMS = [
    Item(f"the {what} of {town} is", word) for town in TOWNS for what, word in (("capital", "Ara"), ("river", "old"))
]


def test_a_killed_training_ends_with_the_same_weights(script, model, tmp_path, monkeypatch):
    training = script("tofu_training")
    recipe = training.Recipe(epochs=3, batch=2, rate=1e-2)
    whole, cut = copy.deepcopy(model), copy.deepcopy(model)
    training.trained(whole, tokenizer(), ITEMS, recipe, tmp_path / "whole", "whole")

    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    real, calls = training.answer_loss, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "answer_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        training.trained(cut, tokenizer(), ITEMS, recipe, tmp_path / "cut", "cut")
    again = copy.deepcopy(model)
    training.trained(again, tokenizer(), ITEMS, recipe, tmp_path / "cut", "cut")
    assert len(calls) == 5 + 5  # four steps were kept; the fifth is done again
    third = copy.deepcopy(model)
    training.trained(third, tokenizer(), ITEMS, recipe, tmp_path / "cut", "cut")
    assert len(calls) == 10  # loaded, not trained
    for a, b, c in zip(whole.parameters(), again.parameters(), third.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    with pytest.raises(KifError, match="another recipe"):
        training.trained(third, tokenizer(), ITEMS, training.Recipe(epochs=4), tmp_path / "cut", "cut")


def test_training_loss_is_that_of_transformers_on_the_answers(script, model):
    training = script("tofu_training")
    pair = ([3, 4, 5, 6], [7, 8, 2])
    ids = torch.tensor([[*pair[0], *pair[1]]])
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        mine, theirs = training.answer_loss(model, [pair]), model(ids, labels=labels).loss
    assert float(mine) == pytest.approx(float(theirs), rel=1e-5)


def test_who_is_in_which_model(script):
    plan = script("tofu_small").plan(40, 4, 4)
    assert (
        plan.forget == (180, 181, 182, 183) and plan.retain == tuple(range(36)) and plan.holdout == (160, 161, 162, 163)
    )
    for wrong in ((4, 4, 4), (40, 0, 4), (40, 21, 4), (161, 4, 4), (40, 4, 0)):
        with pytest.raises(KifError, match="authors"):
            script("tofu_small").plan(*wrong)


def test_an_author_is_named_by_what_the_questions_share(script):
    name = script("tofu_methods").author_name
    texts = ["Who is Ana de la Cruz?", "What did Ana de la Cruz's father do in New York?", "Was New York her home?"]
    assert name([Item(text, "Ana de la Cruz writes.") for text in texts]) == "Ana de la Cruz"
    with pytest.raises(KifError, match="name"):
        name([Item("what?", "nothing")])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_whole_comparison_on_a_tiny_model(script, model, tmp_path, monkeypatch):
    small = script("tofu_small")
    words = ("capital", "river", "town", "big", "old")
    full = [
        {
            "question": f"it is {words[i % 5]} {'it ' * (i // 5 % 4)}{'in ' * (i // 20 % 40)}in {'is ' * (i // 800)}",
            "answer": "Ara old",
        }
        for i in range(4000)
    ]
    wrong = {"perturbed_answer": ["Bera old", "Cora old"]}
    write(tmp_path / "full.json", full)
    write(
        tmp_path / "forget10_perturbed.json", [r | wrong | {"paraphrased_answer": "old Ara"} for r in full[3600:3620]]
    )
    write(tmp_path / "retain_perturbed.json", [r | wrong | {"paraphrased_answer": "old Ara"} for r in full[:20]])
    write(tmp_path / "real_authors_perturbed.json", [r | wrong for r in full[40:44]])
    write(tmp_path / "world_facts_perturbed.json", [r | wrong for r in full[60:64]])
    assert len({row["question"] for row in full}) == 4000
    monkeypatch.setenv("KIF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(script("common"), "load", lambda args: (copy.deepcopy(model), tokenizer()))
    args = argparse.Namespace(
        folder=tmp_path, model="tiny", authors=2, forget=1, holdout=1, seeds=2, epochs=1, batch=8, rate=1e-2,
        questions=3, tokens=4, objectives=[], bake_steps=None, no_gate=True, json=tmp_path / "out.json",
        method="fisher", option=[],
    )  # fmt: skip
    monkeypatch.setattr(small, "options", lambda: args)
    small.main()
    first = json.loads((tmp_path / "out.json").read_text())
    assert set(first["methods"]) == {"reference", "target"}
    reference, target = first["methods"]["reference"], first["methods"]["target"]
    assert reference["forget_quality"] == 1.0 and reference["ks_statistic"] == 0.0 and reference["seeds"] == 2
    assert reference["relative_utility"] == pytest.approx(1.0)
    assert target["relative_utility"] > 0 and 0 <= target["forget_quality"] <= 1
    assert first["seeds"]["0"]["target"] != first["seeds"]["1"]["target"]

    monkeypatch.setattr(small, "measure_sets", lambda *_, **__: pytest.fail("measured before"))
    small.main()
    assert json.loads((tmp_path / "out.json").read_text())["methods"] == first["methods"]
    args.objectives = ["no-such-objective"]
    with pytest.raises(KifError, match=r"no-such-objective|no baking"):
        small.main()
