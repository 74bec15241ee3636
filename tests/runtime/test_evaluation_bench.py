"""What the measuring scripts in bench/ rest on: journals that survive a kill, ids, the choice of subjects."""

import json

import pytest
from evaluating import fact

from kif_runtime import KifError


def test_a_row_cut_off_by_a_kill_is_measured_again(script, tmp_path):
    common, path = script("common"), tmp_path / "journal.jsonl"
    journal = common.Journal(path)
    journal.append("a", {"value": [1, 2.5]})
    journal.append("b", {"value": None})
    with path.open("ab") as file:
        file.write(b'{"key": "c", "val')
    again = common.Journal(path)
    assert again.rows == {"a": {"value": [1, 2.5]}, "b": {"value": None}}
    again.append("c", {"value": 3})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_names_of_the_same_slug_have_ids_of_their_own(script):
    ids = {script("common").capsule_id(name) for name in ("New York", "new-york", "New  York", "纽约")}
    assert len(ids) == 4


def test_every_relation_is_there_before_any_comes_twice(script):
    facts = [fact(f"S{i}", "Ara") for i in range(30)]
    facts = [f.__class__(f.subject, "ABC"[i % 3] if i < 29 else "D", f.prompt, f.answer) for i, f in enumerate(facts)]
    relation = {f.subject: f.relation for f in facts}
    choose = script("facts_table").choose
    for seed in range(5):
        names = choose(facts, 10, seed)
        assert {relation[name] for name in names[:4]} == set("ABCD") and len(set(names)) == 10
    assert choose(facts, 10, 0) == choose(facts, 10, 0) != choose(facts, 10, 1)
    assert sorted(choose(facts, None, 0)) == sorted(relation)
    assert "S29" not in choose(facts, None, 0, {"S29"})


def test_word_level_text_gets_its_punctuation_back(script, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a well @-@ known man , born in 1 @,@ 900 ( he said ) . It 's his .\n")
    assert script("common").read_text(path) == "a well-known man, born in 1,900 (he said). It's his.\n"
    path.write_text("left , alone")
    assert script("common").read_text(path) == "left , alone"
    with pytest.raises(KifError, match="cannot read"):
        script("common").read_text(tmp_path / "none")


def test_means_and_shares_over_subjects_are_those_by_hand(script):
    report = script("facts_report")

    def row(subject, kept, ratio, false, moved):
        facts = [{"subject": subject, "form": "bare", "kept": k, "first": True} for k in kept]
        return {
            "subject": subject,
            "kind": "place",
            "facts": facts,
            "neighbours": {"mean": moved, "nearest_mean": None, "worst": None},
            "text": {"ratio": ratio, "false": false, "negatives": 1000, "touched": 4, "tokens": 2000},
            "mining": {"seconds": 2.0, "bytes": 100, "signatures": 3, "warnings": []},
        }

    found = report.aggregate([row("A", [0.0, 0.4], 1.0, 0, 0.0), row("B", [None, -0.1], 1.02, 3, 0.01)])
    kept = found["kept"]["bare"]["kept"]
    assert kept["facts"] == 3 and kept["mean"] == pytest.approx(0.1) and kept["beyond"] == pytest.approx(1 / 3)
    side = found["side_effects"]
    assert (side["perplexity_ratio"], side["perplexity_ratio_worst"]) == (pytest.approx(1.01), 1.02)
    assert (side["false_fire"], side["false_fire_worst"]) == (pytest.approx(0.0015), 0.003)
    assert side["neighbours"] == pytest.approx(0.005) and side["touched"] == 0.002 and side["nearest"] is None
    assert [f["kept"] for f in found["worst"]] == [0.4, -0.1, 0.0]
    assert found["kinds"]["place"]["kept"]["facts"] == 3
