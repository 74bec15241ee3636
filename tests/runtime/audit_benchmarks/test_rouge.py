"""ROUGE-L against hand counts and the two packages whose numbers it has to give."""

import random

import pytest

from kif_runtime import KifError
from kif_runtime.evaluation.rouge import rouge_l, rouge_l_union
from kif_runtime.evaluation.stemming import stem

TEXT = """the a B. running runs Paris c. d e . it quickly happily relational conditional hopefulness operators ties
died flying skies proceed formaliti's 2nd Café U.S. agreed plastered controlling"""
WORDS = TEXT.split()
ENDS = """s ies ied eed ed ing y ational enci izer alli bli entli eli ousli ization logi icate ful ness ement ion"""


@pytest.mark.parametrize(
    ("reference", "text", "recall", "precision"),
    [
        ("The author's full name is Hsiao", "name is: Hsiao!", 3 / 7, 1.0),
        ("He was running daily", "daily he runs", 2 / 4, 2 / 3),  # he and run; daily stands elsewhere
        ("a b c d", "a x c y d", 3 / 4, 3 / 5),
        ("Paris", "", 0.0, 0.0),
        ("...", "Paris", 0.0, 0.0),
    ],
)
def test_counts_by_hand(reference, text, recall, precision):
    found = rouge_l(reference, text)
    assert (found.recall, found.precision) == pytest.approx((recall, precision))
    assert found.f1 == pytest.approx(2 * recall * precision / (recall + precision) if recall else 0.0)


def test_stems_by_hand():
    """From Porter's paper, and the words that the usual implementation treats otherwise."""
    pairs = {
        "caresses": "caress", "ponies": "poni", "ties": "tie", "cats": "cat", "agreed": "agre", "plastered": "plaster",
        "motoring": "motor", "sized": "size", "hopping": "hop", "falling": "fall", "filing": "file", "happy": "happi",
        "sky": "sky", "relational": "relat", "vietnamization": "vietnam", "triplicate": "triplic", "probate": "probat",
        "controll": "control", "roll": "roll", "dying": "die", "enjoy": "enjoy", "died": "die", "spied": "spi",
    }  # fmt: skip
    assert {word: stem(word) for word in pairs} == pairs


def test_union_of_sentences_by_hand():
    found = rouge_l_union("Paris is old. Paris is big", "Paris is big now")
    # the union of common subsequences is {Paris, is, big} of the words {Paris, is, old, big}
    assert (found.recall, found.precision) == (3 / 4, 3 / 4)
    for empty in ("", "..."):
        with pytest.raises(KifError, match="no answer"):
            rouge_l_union("Paris", empty)


def test_union_equals_the_package_rouge():
    package = pytest.importorskip("rouge").Rouge(metrics=["rouge-l"])
    rng = random.Random(0)
    for _ in range(400):
        a, b = (" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(2))
        if not a.strip(".") or not b.strip("."):
            continue
        theirs, ours = package.get_scores(b, a)[0]["rouge-l"], rouge_l_union(a, b)
        assert (ours.recall, ours.precision) == pytest.approx((theirs["r"], theirs["p"]), abs=1e-12)


@pytest.mark.slow  # importing NLTK alone takes seconds
def test_rouge_l_equals_rouge_score_and_stems_equal_nltk():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    stemmer = pytest.importorskip("nltk.stem.porter").PorterStemmer()
    rng = random.Random(0)
    for _ in range(1000):
        a, b = (" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(2))
        theirs, ours = scorer.score(a, b)["rougeL"], rouge_l(a, b)
        assert (ours.recall, ours.precision, ours.f1) == (theirs.recall, theirs.precision, theirs.fmeasure)
    roots = ("nation", "happ", "fl", "y", "control", "agre", "hop", "lik", "operat", "log", "b", "eas", "ye", "all")
    for word in (root + end + more for root in roots for end in ENDS.split() for more in ("", "s", "e", "ll")):
        assert stem(word) == stemmer.stem(word), word
