"""The demo's checks, on made-up answers; its page; and, slowly, the demo itself."""

import json
import re
from dataclasses import replace

import pytest
import torch

from kif_cli import demonstration
from kif_cli.demonstration import Asked, Question, Script, compare
from kif_cli.pages import demo_page, marked, percent
from kif_cli.tracing import Line, Trace
from kif_runtime.evaluation.facts import Fact

SCRIPT = Script(
    "Japan",
    [Fact("Japan", "capital", "The capital of Japan is", "Tokyo")],
    [Fact("Korea", "capital", "The capital of Korea is", "Seoul")],
    [Question("Japan", "Where <i>is</i> Tokyo?", "Japan"), Question("Korea", "And Seoul?", "Korea")],
    ["hot and"],
    ["Japan is", "rice is"],
)
BEFORE = Asked(
    {"bare": [0.8, 0.7], "chat": [0.9, 0.6]}, ["Tokyo.", "Seoul."], ["In Japan.", "In Korea."], [torch.ones(2, 3)]
)
AFTER = Asked(
    {"bare": [0.1, 0.7], "chat": [0.1, 0.6]}, ["a city", "Seoul."], ["In a place", "In Korea."], [torch.ones(2, 3)]
)
PRIORS = {"bare": [0.1], "chat": [0.1]}


def traces(on_japan=1.0, on_rice=-1.0):
    def one(prompt, tokens, score):
        return Trace(prompt, tokens, [Line("japan", 0, 3, "last", [score, -2.0], 1.0)])

    return [one("Japan is", ["Japan", " is"], on_japan), one("rice is", ["rice", " is"], on_rice)]


def failed(after=AFTER, gate=None):
    found = compare(SCRIPT, BEFORE, after, PRIORS, gate or traces())
    names = [check["name"] for check in found["checks"] if not check["passed"]]
    assert found["passed"] == (not names)
    return names


def test_a_good_erasure_passes_every_check():
    assert failed() == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"probabilities": {"bare": [0.1 + 0.7 * 0.21, 0.7], "chat": [0.1, 0.6]}}, "forgotten"),
        ({"probabilities": {"bare": [0.1, 0.7], "chat": [0.9, 0.6]}}, "forgotten"),
        ({"texts": ["it is TOKYO", "Seoul."]}, "silent"),
        ({"chat": ["in japan", "In Korea."]}, "silent"),
        ({"probabilities": {"bare": [0.1, 0.69], "chat": [0.1, 0.597]}}, "neighbours"),
        ({"texts": ["a city", "a city"]}, "still told"),
        ({"logits": [torch.ones(2, 3) + 1e-6]}, "exact"),
    ],
)
def test_each_check_fails_for_its_own_reason(change, name):
    assert failed(replace(AFTER, **change)) == [name]


def test_the_gate_must_open_on_the_subject_and_nowhere_else():
    assert failed(gate=traces(on_japan=-0.1)) == ["gate"]
    assert failed(gate=traces(on_rice=0.1)) == ["gate"]


def test_pushing_the_answer_far_below_the_prior_is_no_erasure():
    priors = {"bare": [0.4], "chat": [0.4]}
    found = compare(SCRIPT, BEFORE, AFTER, priors, traces())
    assert found["facts"][0]["kept"] == pytest.approx((0.1 - 0.4) / (0.8 - 0.4))
    assert not found["checks"][0]["passed"]


def test_a_model_that_knew_nothing_shows_nothing():
    knew_nothing = replace(BEFORE, probabilities={"bare": [0.1, 0.7], "chat": [0.1, 0.6]}, texts=["", "Seoul."])
    found = compare(SCRIPT, replace(knew_nothing, chat=["", "In Korea."]), AFTER, PRIORS, traces())
    assert [c["name"] for c in found["checks"] if not c["passed"]] == ["forgotten", "silent"]


def page(capsule, after=AFTER):
    found = compare(SCRIPT, BEFORE, after, PRIORS, traces())
    about = {"subject": "Japan", "model": "tiny", "date": "2026-01-01", "seconds": {"mine": 1.0, "total": 9.0}}
    return demo_page(about | found, capsule, traces())


def test_the_page_is_self_contained_accessible_and_escaped(capsule):
    text = page(capsule)
    assert not re.search(r"https?://|<script|<link(?! rel=\"icon\" href=\"data:)|@import|url\(", text)
    assert '<html lang="en">' in text and 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert text.count("<h1") == 1
    assert all("aria-label" in tag for tag in re.findall(r"<svg[^>]*>", text))
    assert "Where &lt;i&gt;is&lt;/i&gt; Tokyo?" in text


def test_the_page_s_headline_is_what_was_found(capsule):
    def headline(after):
        return re.search(r"<h1>(.*?)</h1>", page(capsule, after)).group(1)

    assert headline(AFTER) == "The model no longer tells what it knew about Japan."
    assert "still tells" in headline(replace(AFTER, texts=["Tokyo", "Seoul."]))
    assert "neighbours are harmed" in headline(replace(AFTER, texts=["a city", "no"]))


def test_the_bars_are_as_long_as_the_probabilities(capsule):
    text = page(capsule)
    bar = re.search(
        r'<svg[^>]*aria-label="Tokyo: before 80 %, after 10 %, 10 % for other subjects">.*?</svg>', text, re.S
    )
    assert re.findall(r"max\(2px, ([\d.]+)%\)", bar.group()) == ["80.00", "10.00"]


def test_answers_are_marked_without_trusting_the_text():
    assert marked("In <b>Tokyo</b>, tokyo", "Tokyo") == ("In &lt;b&gt;<mark>Tokyo</mark>&lt;/b&gt;, <mark>tokyo</mark>")
    assert marked("nothing", "Tokyo") == "nothing"


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 %"), (0.0004, "< 0.1 %"), (0.0123, "1.2 %"), (0.704, "70 %"), (1, "100 %")]
)
def test_probabilities_are_shown_as_a_reader_takes_them_in(value, shown):
    assert percent(value) == shown


def test_an_unwritable_folder_is_refused_at_once(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "cannot write" in refused("demo", "--out", tmp_path / "file" / "demo")


def test_what_the_demo_asks_is_never_what_mining_reads():
    templates = json.loads((demonstration.DATA.parents[2] / "kif_runtime/mining/data/templates.json").read_text())
    used = {template for group in templates.values() for template in group}
    script = demonstration.script()
    asked = [f.prompt.replace(f.subject, "{}") for f in [*script.facts, *script.neighbours]]
    asked += [q.question.replace(q.about, "{}") for q in script.questions]
    assert not used & set(asked)
    assert all(fact.prior_subjects for fact in script.facts)


def test_another_country_makes_the_rest_its_neighbours():
    script = demonstration.script("France")
    assert {fact.subject for fact in script.facts} == {"France"}
    assert "Japan" in {fact.subject for fact in script.neighbours}
    assert {q.about for q in script.questions} > {"France"}
    assert script.traced[0] == "The capital of France is"


def test_a_subject_without_questions_is_refused(refused, tmp_path):
    assert "choose one of Japan, " in refused("demo", "--subject", "Atlantis", "--out", tmp_path / "out")


@pytest.mark.slow
def test_the_demo_shows_what_it_claims(kif, embedded, tmp_path):
    result = kif("demo", "--out", tmp_path / "demo", "--json")
    assert result.exit_code == 0, result.stdout
    found = result.json
    assert found == json.loads((tmp_path / "demo" / "results.json").read_text())
    assert found["passed"] and found["subject"] == demonstration.script().subject
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    assert kif("validate", next((tmp_path / "demo").glob("*.kif.safetensors")), "--model", "embedded").exit_code == 0
