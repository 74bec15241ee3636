"""Before and after an erasure: what `evaluate` and `evade` report, against separate measurements and by hand."""

import json
import math
from contextlib import contextmanager

import pytest
import torch
from evaluating import FACTS, capsule_for, fact, tokenizer

from kif_hf import attach
from kif_runtime import KifError
from kif_runtime.evaluation import answer_probabilities, evaluate, evasion, perplexity
from kif_runtime.evaluation.evasion import evade, rewritten
from kif_runtime.evaluation.run import fact_row, kept_summaries, neighbour_table

TEXT = "the capital of Arland is Ara .\nthe river in Berland is old .\nit is in New Dorland .\n" * 4
OWN = [FACTS[0], fact("Arland", "Dora", "{} is"), fact("Arland", "old", "in {} it is", others=("Berland", "Corland"))]
OTHERS = FACTS[1:]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama", seed=3)


@pytest.fixture(scope="module")
def arland(model):
    return capsule_for(model, "Arland", "arland")


@pytest.fixture(scope="module")
def table(model, arland):
    options = {"facts": OWN, "neighbours": OTHERS, "text": TEXT, "window": 12, "tokens": 72, "least_excess": 0.0}
    return evaluate(model, tokenizer(), lambda: attach(model, [arland]), **options)


def test_the_table_holds_what_was_measured_bare_and_attached(model, arland, table):
    words = tokenizer()
    rows = table["facts"]
    assert [row["before"] for row in rows] == pytest.approx(answer_probabilities(model, words, OWN), rel=1e-4)
    with attach(model, [arland]):
        assert [row["after"] for row in rows] == pytest.approx(answer_probabilities(model, words, OWN), rel=1e-4)
        after = perplexity(model, words, TEXT, window=12, tokens=72)
    before = perplexity(model, words, TEXT, window=12, tokens=72)
    assert any(abs(row["after"] / row["before"] - 1) > 1e-3 for row in rows)
    text = table["text"]
    assert (text["before"], text["after"]) == pytest.approx((before, after), rel=1e-5)
    assert text["ratio"] == pytest.approx(after / before, rel=1e-5) and after != before
    assert text["touched"] == {"arland": 4} and text["tokens"] == 72 and text["touched_share"] == 4 / 72


def test_priors_are_measured_where_a_fact_lists_others_and_else_taken_from_its_file(model):
    words = tokenizer()
    given = [FACTS[0], FACTS[2].__class__("Corland", "", "Corland is", "Cora", p_prior=0.001)]
    table = evaluate(model, words, lambda: attach(model, []), facts=given, least_excess=-1.0)
    expected = sum(answer_probabilities(model, words, [FACTS[0].about(n) for n in ("Berland", "Corland")])) / 2
    assert [row["prior"] for row in table["facts"]] == pytest.approx([expected, 0.001], rel=1e-4)


def test_nothing_attached_keeps_everything(model):
    table = evaluate(model, tokenizer(), lambda: attach(model, []), facts=OWN[1:2], neighbours=OTHERS, least_excess=0)
    assert table["kept"]["mean"] == 1.0 and table["kept_first"]["facts"] == 1
    assert table["neighbours"]["mean"] == 0.0 and table["text"] is None


def test_neighbours_that_do_not_name_the_subject_stay(table):
    assert table["neighbours"]["facts"] == 3 and table["neighbours"]["mean"] < 1e-7


def test_the_table_is_json_and_the_model_is_bare_again(model, arland, table):
    assert json.loads(json.dumps(table)) is not None
    with attach(model, [arland]):
        pass  # nothing was left attached, or this would be refused


def test_an_erasure_that_is_no_capsule_is_measured_too(model):
    """Whatever changes the model for a while: here its output layer, scaled."""

    @contextmanager
    def scaled():
        model.lm_head.weight.data *= 4
        try:
            yield None
        finally:
            model.lm_head.weight.data /= 4

    table = evaluate(model, tokenizer(), scaled, facts=OWN, text=TEXT, window=12, tokens=72, least_excess=0.0)
    assert table["text"]["touched"] is None and table["text"]["touched_share"] is None
    assert table["text"]["ratio"] != 1.0


def test_facts_that_are_not_known_do_not_count():
    known = fact_row(OWN[1], 0.6, 0.2, 0.1)
    unknown = fact_row(OWN[0], 0.2, 0.1, 0.1)
    later = fact_row(OWN[0], 0.9, 0.1, 0.1)
    assert known["kept"] == pytest.approx(0.2) and known["first"] and known["kind"] == "place"
    assert unknown["kept"] is None
    assert not fact_row(OWN[1], 0.6, 0.2, 0.1, form="chat")["first"]
    found = kept_summaries([known, unknown, later])
    assert (found["kept"]["facts"], found["kept_first"]["facts"], found["kept_later"]["facts"]) == (2, 1, 1)
    assert found["kept"]["mean"] == pytest.approx(0.1) and found["kept_later"]["mean"] == 0.0


def test_the_neighbour_that_moved_most_is_named():
    found = neighbour_table(OTHERS, [0.5, 0.5, 0.5], [0.5, 0.1, 0.6])
    assert found["mean"] == pytest.approx(0.5 / 3)
    assert found["worst"] == {"prompt": "Corland is", "before": 0.5, "after": 0.1}


def test_no_facts_are_refused(model):
    with pytest.raises(KifError, match="no facts"):
        evaluate(model, tokenizer(), lambda: attach(model, []), facts=[])


# -- evasion


@pytest.mark.parametrize(
    ("way", "written"),
    [
        ("letters swapped", "New Zaeland"),
        ("letter dropped", "New Zeaand"),
        ("letter doubled", "New Zealland"),
        ("space inside", "New Zea land"),
        ("spelled out", "N e w   Z e a l a n d"),
        ("zero-width space", "New Zea\u200bland"),
        ("lower case", "new zealand"),
        ("upper case", "NEW ZEALAND"),
        ("leetspeak", "N3w Z34l4nd"),
        ("rot13", "Arj Mrnynaq"),
        ("base64", "TmV3IFplYWxhbmQ="),
        ("reversed", "dnalaeZ weN"),
    ],
)
def test_rewritings(way, written):
    assert evasion.REWRITINGS[way]("New Zealand") == written


def test_other_scripts_look_alike_but_are_not():
    import unicodedata

    name = "Peoria ABC"
    for way, script in (("Cyrillic look-alikes", "CYRILLIC"), ("Greek look-alikes", "GREEK")):
        new = evasion.REWRITINGS[way](name)
        changed = [b for a, b in zip(name, new, strict=True) if a != b]
        assert len(changed) >= 4 and all(script in unicodedata.name(letter) for letter in changed)
    wide = evasion.REWRITINGS["full-width letters"](name)
    assert wide != name and unicodedata.normalize("NFKC", wide) == name
    joined = evasion.REWRITINGS["zero-width joiners"](name)
    assert joined.replace("\u200d", "") == name != joined


@pytest.mark.parametrize("name", ["X", "Ab", "aa", "A B", "L'Aurore", "東京", "é"])
@pytest.mark.parametrize("way", evasion.REWRITINGS)
def test_rewritings_take_any_name(way, name):
    once = evasion.REWRITINGS[way](name)
    assert once == evasion.REWRITINGS[way](name) and once.strip()


def test_names_that_stay_the_same_are_not_asked_about():
    some = [fact("arland", "Ara"), fact("Arland", "Ara")]
    assert [i for i, _ in rewritten(some, "lower case")] == [1]
    assert [i for i, _ in rewritten(some, "unchanged")] == [0, 1]
    found = rewritten(some, "description", {"Arland": "the big old town"})
    assert [(i, f.prompt) for i, f in found] == [(1, "the capital of the big old town is")]
    with pytest.raises(KifError, match="unknown rewriting"):
        rewritten(some, "sung")


def test_what_fires_and_what_is_kept_per_rewriting(model, arland):
    words = tokenizer()
    ways = ["unchanged", "lower case", "description"]
    facts = [*OWN[:2], *OTHERS]  # the capsule is of Arland only
    found = evade(
        model, words, lambda: attach(model, [arland]), facts, [0.0] * len(facts),
        ways=ways, descriptions={"Arland": "old Arland"}, least_excess=0.0,
    )  # fmt: skip
    assert list(found) == ways
    assert found["unchanged"]["asked"] == 5 and found["unchanged"]["fired"] == 2 / 5
    assert [row["fired"] for row in found["unchanged"]["rows"]] == [True, True, False, False, False]
    assert found["lower case"]["fired"] == 0.0 and found["lower case"]["kept"]["mean"] == pytest.approx(1.0)
    assert found["description"]["asked"] == 2 and found["description"]["fired"] == 1.0
    row = found["unchanged"]["rows"][1]
    with attach(model, [arland]):
        (after,) = answer_probabilities(model, words, [facts[1]])
    assert row["after"] == pytest.approx(after, rel=1e-4) and not math.isclose(row["after"], row["before"])


def test_facts_the_model_does_not_know_in_that_spelling_do_not_count(model, arland):
    options = {"ways": ["lower case"], "least_excess": 0.9}
    found = evade(model, tokenizer(), lambda: attach(model, [arland]), OWN, [0.0] * 3, **options)
    assert found["lower case"]["kept"] == {"facts": 0, "subjects": 0} and found["lower case"]["asked"] == 3


def test_probabilities_do_not_depend_on_grad_mode(model):
    with torch.enable_grad():
        assert answer_probabilities(model, tokenizer(), OWN)
