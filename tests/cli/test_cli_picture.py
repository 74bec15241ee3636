"""What a page draws, and what is taken out of what is written."""

from types import SimpleNamespace

import pytest

from kif_cli.picture import bars, charts, lines, numbers, shown
from kif_cli.privacy import cleaner
from kif_runtime.evaluation.audit import Subject


def figure(after, **more):
    return {"what": "it", "after": after, "interval": None, "before": None, "reference": None, "level": None} | more


def row(name, **parts):
    (group,) = bars({name: figure(**parts)})
    return group["rows"][0]


def test_bars_are_shares_of_the_row():
    kept = row("kept", after=0.25, before=1.0, interval=[0.1, 0.4], level=0.0)
    assert kept["marks"] == {"before": 100.0, "after": 25.0, "reference": None, "level": 0.0}
    assert kept["interval"] == [10.0, 40.0]
    assert row("kept", after=-0.2)["marks"]["after"] == 0.0  # the figure beside it tells the sign
    assert row("mass", after=4.0, before=1.0)["marks"] == {
        "before": 25.0,
        "after": 100.0,
        "reference": None,
        "level": None,
    }


def test_what_is_hardly_anything_looks_like_it():
    assert row("neighbours", after=1e-8)["marks"]["after"] == 0.0
    assert row("neighbours", after=0.02, before=0.0, interval=[0.01, 0.04])["marks"]["after"] == 50.0


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("kept", 0.034, "3 %"),
        ("kept", -0.2, "−20 %"),
        ("mass", 0.0306, "× 0.0306"),
        ("neighbours", 0.0, "0"),
        ("neighbours", 0.00123, "0.0012"),
        ("lens", None, "–"),
    ],
)
def test_figures_as_a_reader_takes_them_in(name, value, said):
    assert shown(name, value) == said


def test_lines_span_the_chart():
    rows = [{"block": 0, "a": 0.0, "b": None}, {"block": 1, "a": 0.5, "b": None}, {"block": 2, "a": 1.0, "b": None}]
    chart = lines(rows, [("a", "one", "after"), ("b", "none", "before")])
    (series,) = chart["series"]
    assert series["points"] == "0.0,132.0 160.0,66.0 320.0,0.0"
    assert (chart["low"], chart["high"], chart["last"]) == (0.0, 1.0, 2)
    assert lines(rows[:1], [("a", "one", "after")]) is None and lines(None, []) is None and charts(None) == []


def test_any_suite_can_be_shown_by_its_numbers():
    table = {
        "forget_quality": 0.5,
        "by": {"set_one": {"rouge": -0.25}},
        "rows": [1, 2],
        "name": "x",
        "attacks": [{"n": 1}],
        "tasks": [{"task": "piqa", "before": {"accuracy": 0.5, "interval": (0.4, 0.6)}}, {"nameless": 3}],
    }
    assert numbers(table) == [
        ("forget quality", "0.5"),
        ("by, set one, rouge", "−0.25"),
        ("tasks, piqa, before, accuracy", "0.5"),
    ]
    assert numbers({"a": {str(n): n for n in range(99)}}, most=5)[-1] == ("a, 4", "4")


def test_names_aliases_and_ids_go_and_keys_stay():
    clean = cleaner([Subject("New Dorland", ("Dora",)), Subject("Text")], ["Arland"])
    table = {
        "text": {"new": 1}, "touched": {"new-dorland-29": 3}, "prompt": "anything", "answer": None, "texts": ["a", "b"],
        "told": ["NEW DORLAND and Dora's Dorans in arland", 4, True, None],
        "where": "/out/new-dorland_v2/Dora.json",
    }  # fmt: skip
    assert clean(table) == {
        "text": {"new": 1}, "touched": {"subject 1-29": 3}, "prompt": None, "answer": None, "texts": None,
        "told": ["subject 1 and subject 1's Dorans in other 1", 4, True, None],
        "where": "/out/subject 1_v2/subject 1.json",
    }  # fmt: skip


def test_a_capsules_own_names_go_too_however_their_words_are_joined():
    held = [SimpleNamespace(id="jane-roe", name=None, aliases=()), SimpleNamespace(id="0" * 32, name=None, aliases=())]
    clean = cleaner(
        [Subject("New Dorland")], capsules=[*held, SimpleNamespace(id="new-dorland", name=None, aliases=())]
    )
    told = ["/out/jane_roe", "JaneRoe", "jane-roe.kif", "new_dorland", "0" * 32, "roe"]
    assert clean(told) == ["/out/subject 2", "subject 2", "subject 2.kif", "subject 1", "0" * 32, "roe"]
