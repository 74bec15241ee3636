"""Facts and their probabilities, against a plain loop and other libraries."""

import json

import numpy as np
import pytest
import scipy.stats
import torch
from evaluating import FACTS, fact, tokenizer

from kif_runtime import KifError
from kif_runtime.evaluation import (
    answer_probabilities,
    bootstrap,
    excess_kept,
    load_facts,
    prior_probabilities,
)
from kif_runtime.evaluation.kinds import KINDS, kind_of, kinds_of, name_states, nearest
from kif_runtime.evaluation.statistics import summary

ROW = {"subject": "Arland", "prompt": "The capital of Arland is", "answer": "Ara", "relation": "capital"}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tiny_model):
    return tiny_model(request.param)


def write(tmp_path, *rows):
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_facts_are_read_whole(tmp_path):
    more = ROW | {"p_before": 0.5, "p_prior": 0.1, "prior_subjects": ["Berland"], "source": "mine"}
    one, two = load_facts(write(tmp_path, ROW, "", more))
    assert (one.subject, one.relation, one.prompt, one.answer) == ("Arland", "capital", ROW["prompt"], "Ara")
    assert one.p_before is None and one.prior_subjects == ()
    assert (two.p_before, two.p_prior, two.prior_subjects) == (0.5, 0.1, ("Berland",))


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path):
    (found,) = load_facts(write(tmp_path, json.dumps(ROW | {"answer": "A\u2028ra"}, ensure_ascii=False)))
    assert found.answer == "A\u2028ra"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "no JSON"),
        ("[1]", "JSON object"),
        ({**ROW, "answer": " "}, "'answer' is missing"),
        ({**ROW, "subject": 5}, "'subject' is missing"),
        ({**ROW, "prompt": "The capital is"}, "does not name"),
        ({**ROW, "p_before": 1.5}, "'p_before'"),
        ({**ROW, "p_prior": True}, "'p_prior'"),
        ({**ROW, "p_prior": float("nan")}, "'p_prior'"),
        ({**ROW, "prior_subjects": "Berland"}, "'prior_subjects'"),
        ({**ROW, "relation": None}, "'relation'"),
        ({**ROW, "answer": "\ud800"}, "surrogates"),
        ("[" * 100_000, "nested"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, says):
    with pytest.raises(KifError, match=says) as caught:
        load_facts(write(tmp_path, ROW, row))
    assert "facts.jsonl, line 2" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_hold_no_facts_are_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, says in [
        (tmp_path / "none", "no such file"),
        (tmp_path / "binary", "UTF-8"),
        (write(tmp_path), "no facts"),
    ]:
        with pytest.raises(KifError, match=says):
            load_facts(path)


def one_by_one(model, words, text, answer):
    """p of the answer's first word after `text`: one unpadded forward, softmax in float64 by numpy."""
    ids = words(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, -1].double().numpy()
    weights = np.exp(logits - logits.max())
    return weights[words.convert_tokens_to_ids(answer.split()[0])] / weights.sum()


def test_probabilities_are_those_of_one_prompt_at_a_time(model):
    words = tokenizer()
    expected = [one_by_one(model, words, f.prompt, f.answer) for f in FACTS]
    for size in (1, 3, 16):
        found = answer_probabilities(model, words, FACTS, batch_size=size)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert len({round(p, 6) for p in expected}) == len(FACTS)  # or the order would not be seen


def test_chat_form_is_a_user_turn_and_the_prompt_begun_by_the_assistant(model):
    words = tokenizer()
    text = "[BOS] user Complete this sentence: {0} [END] assistant {0}"
    expected = [one_by_one(model, words, text.format(f.prompt), f.answer) for f in FACTS]
    np.testing.assert_allclose(answer_probabilities(model, words, FACTS, form="chat"), expected, rtol=1e-4)


def test_forms_that_cannot_be_had_are_refused(model):
    with pytest.raises(KifError, match="chat template"):
        answer_probabilities(model, tokenizer(template=None), FACTS, form="chat")
    with pytest.raises(KifError, match="unknown form"):
        answer_probabilities(model, tokenizer(), FACTS, form="verse")


def test_progress_is_told_of_every_batch(model):
    seen = []
    answer_probabilities(model, tokenizer(), FACTS, batch_size=3, progress=lambda *state: seen.append(state))
    assert seen == [(3, 4, "answers (bare)"), (4, 4, "answers (bare)")]


def test_the_prior_is_the_mean_over_the_others_in_the_same_question(model):
    words = tokenizer()
    found = prior_probabilities(model, words, FACTS)
    first = [one_by_one(model, words, f"the capital of {name} is", "Ara") for name in ("Berland", "Corland")]
    assert found[0] == pytest.approx(np.mean(first), rel=1e-4)
    assert found[1] == pytest.approx(one_by_one(model, words, "Arland is in the town of", "Bera"), rel=1e-4)
    assert found[2:] == [None, None]


def test_only_the_first_mention_is_replaced():
    assert FACTS[3].about("Ara").prompt == "it is old . the capital of Ara is in it . the big town of New Dorland is"
    assert [f.at_start for f in FACTS] == [False, True, True, False]


def test_excess_is_a_share_of_what_was_known_beyond_guessing():
    assert excess_kept(0.9, 0.5, 0.1) == pytest.approx(0.5)
    assert excess_kept(0.9, 0.1, 0.1) == 0.0
    assert excess_kept(0.9, 0.0, 0.1) == pytest.approx(-0.125)
    assert excess_kept(0.3, 0.9, 0.1) == 1.0 and excess_kept(0.5, 0.0, 0.4) == -1.0
    for nothing in ((0.1, 0.1, 0.1), (0.1, 0.2, 0.3), (float("nan"), 0.1, 0.0)):
        with pytest.raises(KifError, match="over p_prior"):
            excess_kept(*nothing)


def test_the_interval_is_scipys_when_every_value_is_its_own_subject():
    values = np.random.default_rng(5).exponential(size=60)
    low, high = bootstrap(values, resamples=20_000)
    result = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    expected = result.confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=0.02)
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)


def test_subjects_are_drawn_whole():
    """Ten facts of each of eight subjects, alike within one: the interval is as wide as that of the eight."""
    per_subject = np.random.default_rng(2).normal(size=8)
    groups = [name for name in "abcdefgh" for _ in range(10)]
    low, high = bootstrap(np.repeat(per_subject, 10), groups, resamples=20_000)
    result = scipy.stats.bootstrap((per_subject,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    assert (low, high) == pytest.approx(tuple(result.confidence_interval), rel=0.05)
    alone = bootstrap(np.repeat(per_subject, 10), resamples=20_000)
    assert alone[1] - alone[0] < 0.5 * (high - low)


def test_an_interval_of_nothing_is_refused():
    for values, groups in (([], []), ([1.0], ["a", "b"])):
        with pytest.raises(KifError, match="interval"):
            bootstrap(values, groups)


def test_a_summary_counts_facts_and_subjects():
    found = summary([0.0, 0.3, -0.5, 0.1], ["a", "a", "b", "c"])
    assert (found["facts"], found["subjects"], found["beyond"]) == (4, 3, 0.5)
    assert found["mean"] == pytest.approx(-0.025)
    assert found["interval"][0] <= found["mean"] <= found["interval"][1]
    assert summary([], []) == {"facts": 0, "subjects": 0}


@pytest.mark.parametrize(
    ("relation", "prompt", "subject", "kind"),
    [
        ("landmark in country", "Trento is in the country of", "Trento", "place"),
        ("P36", "Ireland's capital,", "Ireland", "place"),
        ("", "The native language of Henri Gault is", "Henri Gault", "person"),
        ("P159", "The headquarter of Chanel is in", "Chanel", "organisation"),
        ("company hq", "HSH Nordbank is headquartered in the city of", "HSH Nordbank", "organisation"),
        ("", "Android Runtime was developed by", "Android Runtime", "product"),
        ("P407", "L'Aurore is written in", "L'Aurore", "work"),
        ("", "1993 Bombay bombings is located in the city of", "1993 Bombay bombings", "event"),
        ("P101", "statistical model works in the field of", "statistical model", "concept"),
        ("", "Something about Trento", "Trento", "other"),
    ],
)
def test_kinds_are_read_off_name_relation_and_question(relation, prompt, subject, kind):
    assert kind_of(relation, prompt, subject) == kind
    assert kind in KINDS


def test_words_of_the_name_are_not_taken_for_the_question():
    assert kind_of("", "The mother tongue of Capital Cities is", "Capital Cities") == "person"


def test_the_nearest_are_of_the_same_kind_and_most_alike(model):
    names = [f.subject for f in FACTS]
    kinds = dict.fromkeys(names, "place") | {"Corland": "person"}
    states = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [1.0, 0.2]]), dim=1)
    assert nearest("Arland", names, states, kinds, 5) == ["New Dorland", "Berland"]
    assert nearest("Arland", names, states, kinds, 1) == ["New Dorland"]
    assert nearest("Corland", names, states, kinds) == []
    assert kinds_of(FACTS) == dict.fromkeys(names, "place")
    own = name_states(model, tokenizer(), names)
    assert own.shape == (4, 32)
    torch.testing.assert_close(own.norm(dim=1), torch.ones(4))


def test_names_are_read_as_if_one_at_a_time(model):
    words, names = tokenizer(), ["big old town", "river", "New Dorland", "Ara"]
    alone = []
    for name in names:
        ids = words("The " + name, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            alone.append(model(ids, output_hidden_states=True).hidden_states[1][0, -1])  # a third of four blocks
    centred = torch.stack(alone) - torch.stack(alone).mean(0)
    expected = centred / centred.norm(dim=1, keepdim=True)
    torch.testing.assert_close(name_states(model, words, names), expected, rtol=1e-4, atol=1e-4)


def test_fact_without_prompt_mention_is_not_made_up():
    assert fact("Arland", "Ara").about("Berland").prior_subjects == ()
