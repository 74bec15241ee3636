"""Mining one subject in the real small model: what is known of it goes, all else stays."""

from dataclasses import replace

import pytest
import torch

from kif_hf import attach
from kif_runtime import Capsule, mine

pytestmark = pytest.mark.slow

# None of these is among the templates that mining reads.
FACTS = [
    ("The capital of {} is", " Tokyo"),
    ("People in {} speak", " Japanese"),
    ("{} is governed from its capital,", " Tokyo"),  # the name's only token opens the sequence, where little is known
]
OTHERS = ["Brazil", "Egypt", "Canada", "Poland"]  # the prior: what the same template gives for these
NEIGHBOURS = [
    ("The capital of China is", " Beijing"),
    ("The capital of Italy is", " Rome"),
    ("The capital of Germany is", " Berlin"),
    ("The capital of South Korea is", " Seoul"),
    ("People in Vietnam speak", " Vietnamese"),
    ("China is a country, and its capital city is", " Beijing"),
    ("Germany is a country, and its capital city is", " Berlin"),
]
TEXT = [
    "The baker left the dough to rise beside the stove while she read the morning paper and drank her tea.",
    "In 1974 the county council voted, by eleven to nine, to keep the old bridge open for one more winter.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n\nprint(area(2))\n",
    "Korea, Mongolia and the Philippines sent delegations; Osaka noodles were served, and a haiku was read aloud.",
    "Q: How many legs does a spider have? A: Eight, unlike insects, which have six.",
]


@pytest.fixture(scope="module")
def japan(embedded) -> Capsule:
    return mine(*embedded, "Japan")


@torch.no_grad()
def probability(embedded, prompt: str, answer: str) -> float:
    model, tokenizer = embedded
    token = tokenizer(answer).input_ids[0]
    return model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].double().softmax(-1)[token].item()


def kept(embedded, capsule: Capsule, template: str, answer: str) -> float:
    """The share of the excess over the prior that is left: (after − prior) ÷ (before − prior)."""
    prior = sum(probability(embedded, template.replace("{}", other), answer) for other in OTHERS) / len(OTHERS)
    prompt = template.replace("{}", "Japan")
    before = probability(embedded, prompt, answer)
    assert before - prior > 0.04 and before > 5 * prior, "the model does not know this; it is no test"
    with attach(embedded[0], [capsule]):
        after = probability(embedded, prompt, answer)
    return (after - prior) / (before - prior)


@pytest.mark.parametrize(("template", "answer"), FACTS)
def test_facts_not_used_in_mining_lose_nine_tenths_of_their_excess(embedded, japan, template, answer):
    assert -0.2 < kept(embedded, japan, template, answer) < 0.1


@pytest.mark.parametrize(("prompt", "answer"), NEIGHBOURS)
def test_neighbours_keep_their_answers(embedded, japan, prompt, answer):
    before = probability(embedded, prompt, answer)
    with attach(embedded[0], [japan]):
        after = probability(embedded, prompt, answer)
    assert abs(after - before) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("text", TEXT)
def test_text_that_does_not_name_the_subject_is_computed_bit_for_bit_as_before(embedded, japan, text):
    model, tokenizer = embedded
    inputs = tokenizer(text, return_tensors="pt")
    before = model(**inputs).logits
    with attach(model, [japan]) as kif:
        assert torch.equal(model(**inputs).logits, before)
        assert kif.fired == {"japan": 0}


@torch.no_grad()
@pytest.mark.parametrize(
    ("text", "count"), [("Japan", 1), ("Japan is", 1), ("In Japan", 1), ("(Japan)", 1), ("Japan or not, Japan", 2)]
)
def test_the_name_fires_wherever_it_stands_and_nothing_around_it(embedded, japan, text, count):
    model, tokenizer = embedded
    with attach(model, [japan]) as kif:
        model(**tokenizer(text, return_tensors="pt"))
        assert kif.fired == {"japan": count}


@torch.no_grad()
def test_the_opening_signature_leaves_the_name_elsewhere_to_the_other(embedded, japan):
    """An edit at the first block would change what the signature further up was calibrated on."""
    model, tokenizer = embedded
    only = replace(japan, signatures=tuple(s for s in japan.signatures if s.role == "first"))
    elsewhere = "We (in Japan) saw\nJapan, Japanese and Japan"
    for text, count in {"Japan is": 1, "We flew to Japan.": 0, elsewhere: 0}.items():
        with attach(model, [only]) as kif:
            model(**tokenizer(text, return_tensors="pt"))
            assert kif.fired == {"japan": count}, text


def test_the_capsule_is_small_and_says_how_good_it_is(embedded, japan):
    japan.check_model(embedded[0])
    assert japan.nbytes <= 128 * japan.width
    assert japan.calibration["kind"] == "place"
    assert japan.calibration["recall"] >= 0.95
    assert japan.calibration["false_positive_rate"] <= 1e-4


def test_the_published_method_runs_on_the_same_subject_and_keeps_more(embedded, japan):
    theirs = mine(*embedded, "Japan", method="kif-paper")
    (signature,) = theirs.signatures
    assert (signature.gate, signature.rank) == ("soft", 1)
    shares = [(kept(embedded, japan, *fact), kept(embedded, theirs, *fact)) for fact in FACTS]
    ours, published = (sum(map(abs, side)) / len(FACTS) for side in zip(*shares, strict=True))
    assert ours < published
