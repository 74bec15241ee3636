"""The suites tofu, rwku and utility on small files, with models whose truth is known."""

import json

import pytest
import torch
from attacking import knowing, never_knew
from auditing import RELATIONS, SUBJECT, TOWNS, known_answer
from auditing import tokenizer as words

from kif_runtime import KifError
from kif_runtime.evaluation import rwku, tofu, utility
from kif_runtime.evaluation.audit import Audit, Subject
from kif_runtime.evaluation.facts import Fact
from kif_runtime.evaluation.states import bare

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    made = words()
    before, made.chat_template = made.chat_template, TEMPLATE
    yield made
    made.chat_template = before


@pytest.fixture
def audited(tokenizer):
    def make(data, after=None, **options):
        facts = [Fact(SUBJECT, r, text.format(SUBJECT), known_answer(SUBJECT, r)) for r, text in RELATIONS.items()]
        return Audit(
            bare(knowing()), bare(after or knowing(), "after"), tokenizer, [Subject(SUBJECT)], facts,
            data=data, reference=bare(never_knew(), "reference"), **options,
        )  # fmt: skip

    return make


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def qa(town, relation, **more):
    wrong = [f"{relation}{n}" for n in range(8) if f"{relation}{n}" != known_answer(town, relation)][:3]
    asked, told = RELATIONS[relation].format(town), known_answer(town, relation)
    return {"question": asked, "answer": told, "perturbed_answer": wrong} | more


@pytest.fixture
def tofu_folder(tmp_path):
    own = [qa(SUBJECT, r, paraphrased_answer=known_answer(SUBJECT, r)) for r in RELATIONS]
    kept = [qa(t, r, paraphrased_answer=known_answer(t, r)) for t in TOWNS[1:4] for r in RELATIONS]
    write(tmp_path / "forget10_perturbed.json", own)
    write(tmp_path / "retain_perturbed.json", kept)
    write(tmp_path / "real_authors_perturbed.json", [qa(t, "river") for t in TOWNS[4:7]])
    write(tmp_path / "world_facts_perturbed.json", [qa(t, "dish") for t in TOWNS[7:10]])
    never = [{"question": RELATIONS[r].format("Nowhere"), "answer": f"{r}0"} for r in RELATIONS]
    write(tmp_path / "holdout10.json", never)
    return tmp_path


def test_tofu_tells_a_model_that_knows_from_one_that_never_did(audited, tofu_folder):
    table = tofu.run(audited({"tofu": tofu_folder}, quick=True))
    json.dumps(table, allow_nan=False)
    states, against = table["states"], table["against"]
    assert table["questions"] == {"forget": 3, "retain": 6, "real_authors": 3, "world_facts": 3, "holdout": 3}
    assert states["before"] == states["after"] and against["before"] == against["after"]
    knows, never = states["before"], states["reference"]
    assert knows["forget_probability"] > 3 * never["forget_probability"]
    assert knows["exact_memorisation"] > 0.9 > 0.5 > never["exact_memorisation"]
    assert knows["paraphrase_probability"] > 3 * never["paraphrase_probability"]
    assert knows["auc"]["loss"] > never["auc"]["loss"] and knows["auc"]["loss"] == 1.0
    assert abs(knows["model_utility"] - never["model_utility"]) < 0.3 and set(knows["parts"]) == set(never["parts"])
    assert against["reference"]["forget_quality"] == 1.0 and against["reference"]["ks_statistic"] == 0.0
    assert against["before"]["ks_statistic"] == 1.0 and against["before"]["forget_quality"] < 0.2
    assert against["before"]["relative_utility"] == 1.0 and against["reference"]["privacy"] == 1.0
    assert against["reference"]["priv_leak"] == pytest.approx(0.0)


def test_tofu_without_its_files_says_which(audited, tofu_folder):
    with pytest.raises(KifError, match="tofu=FOLDER"):
        tofu.run(audited({}))
    (tofu_folder / "world_facts_perturbed.json").unlink()
    with pytest.raises(KifError, match=r"world_facts_perturbed\.json"):
        tofu.run(audited({"tofu": tofu_folder}))
    write(tofu_folder / "world_facts_perturbed.json", [qa(SUBJECT, "dish"), {"question": "so", "answer": 3}])
    with pytest.raises(KifError, match="line 2: 'answer'"):
        tofu.run(audited({"tofu": tofu_folder}))


def probe(level, query, answer, kind, town=SUBJECT):
    return {"query": query, "answer": answer, "type": kind, "target_id": town, "subject": town, "level": str(level)}


@pytest.fixture
def rwku_folder(tmp_path):
    asked = [RELATIONS[r].format(SUBJECT) for r in RELATIONS]
    told = [known_answer(SUBJECT, r) for r in RELATIONS]
    pairs = list(zip(asked, told, strict=True))
    write(tmp_path / "forget_level1.jsonl", [probe(1, q, a, "cloze") for q, a in pairs])
    write(tmp_path / "forget_level2.jsonl", [probe(2, q, a, "simple question") for q, a in pairs])
    kinds = ("prefix injection", "cross-lingual (French)", "incontext learning", "affirmative suffix")
    write(tmp_path / "forget_level3.jsonl", [probe(3, q, a, kind) for kind in kinds for q, a in pairs])
    others = [(RELATIONS[r].format(TOWNS[3]), known_answer(TOWNS[3], r)) for r in RELATIONS]
    write(tmp_path / "neighbor_level1.jsonl", [probe(1, q, a, "cloze") for q, a in others])
    write(tmp_path / "neighbor_level2.jsonl", [probe(2, q, a, "simple question") for q, a in others])
    about = [{"text": f"{q} {a}", "target_id": SUBJECT} for q, a in pairs]
    write(tmp_path / "forget_mia_sample10.jsonl", about)
    write(tmp_path / "retain_mia_sample6.jsonl", [{"text": f"{q} {a}", "target_id": SUBJECT} for q, a in others])
    return tmp_path


@pytest.fixture
def plain_questions(monkeypatch):
    """The tiny model knows sentences, not RWKU's instructions: it is asked the bare query."""
    from kif_runtime.evaluation import rwku as suite

    monkeypatch.setattr(suite, "prompt", lambda tokenizer, one: tokenizer(one.query)["input_ids"])


def test_rwku_by_level_attack_and_neighbour(audited, rwku_folder, plain_questions):
    table = rwku.run(audited({"rwku": rwku_folder}, after=never_knew(), quick=True))
    json.dumps(table, allow_nan=False)
    assert table["people"] == 1
    for name in ("forget_level1", "forget_level2", "forget_level3"):
        row = table["levels"][name]
        assert row["before"]["recall"] > 0.9 and row["after"]["recall"] < 0.4
        assert row["after"] == row["reference"]
    assert table["neighbours"]["neighbor_level2"]["after"]["recall"] > 0.6
    by_kind = {row["kind"]: row["probes"] for row in table["kinds"]}
    assert by_kind["cross lingual"] == 3 and by_kind["role play"] == 0 and len(by_kind) == 9
    attack = next(row for row in table["attacks"] if row["name"] == "RWKU: cross lingual")
    assert attack["success"] <= 1 / 3 and attack["control"]["success"] == 1.0 and attack["tried"] == 3
    found = table["membership"]
    assert found["before"]["forget"]["loss"] > found["after"]["forget"]["loss"]
    assert found["passages"] == {"forget": 3, "retain": 3}


def test_rwku_counts_only_people_that_the_model_knows(audited, rwku_folder, plain_questions):
    made = audited({"rwku": rwku_folder})
    made.before = bare(never_knew(), "before")
    with pytest.raises(KifError, match="knows none of these people"):
        rwku.run(made)
    made.subjects = [Subject("Somebody")]
    with pytest.raises(KifError, match="RWKU's people"):
        rwku.run(made)


def test_utility_scores_files_and_text_by_state(audited, tmp_path):
    items = [
        {"query": RELATIONS["river"].format(t), "choices": ["mayor1 dish2", known_answer(t, "river")], "gold": 1}
        for t in TOWNS[1:7]
    ]
    write(tmp_path / "towns.jsonl", items)
    made = audited({"utility": tmp_path}, text="The river of Town3 is the river1 . " * 40)
    made.after = bare(_untrained(), "after")
    table = utility.run(made)
    (row,) = table["tasks"]
    assert row["task"] == "towns" and row["questions"] == 6
    assert row["before"]["accuracy"]["tried"] == 6
    assert table["text"]["before"] < table["text"]["after"]
    with pytest.raises(KifError, match="utility"):
        utility.run(audited({}))


def _untrained():
    from attacking import fresh

    torch.manual_seed(7)
    return fresh().eval()
