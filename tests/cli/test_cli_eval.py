"""kif eval."""

import json

import pytest
import torch

from kif_cli.pages import eval_page

FACTS = [
    {"subject": "japan", "prompt": "the capital of japan is", "answer": "tokyo", "prior_subjects": ["rice", "city"]},
    {"subject": "france", "prompt": "the capital of france is", "answer": "paris"},
    {"subject": "korea", "prompt": "korea is the capital of", "answer": "seoul"},
]


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    return path


def test_figures_and_page(kif, tiny, capsule_file, facts, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the rice and the city in japan . a city in korea\n" * 20)
    out = tmp_path / "out"
    arguments = ("eval", "-m", tiny.folder, "-c", capsule_file, "--facts", facts, "--text", text, "-o", out)
    result = kif(*arguments, "--json")
    assert result.exit_code == 0
    assert result.json == json.loads((out / "results.json").read_text())
    (fact,) = result.json["facts"]
    ids = tiny.tokenizer(FACTS[0]["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        p = tiny.model(ids).logits[0, -1].softmax(-1)[tiny.words["tokyo"]]
    assert fact["before"] == pytest.approx(float(p), rel=1e-4)
    assert fact["after"] != pytest.approx(fact["before"], rel=1e-3)
    assert result.json["neighbours"]["facts"] == 2
    assert result.json["neighbours"]["mean"] == 0
    assert result.json["text"]["touched"] == {"japan": 20}
    page = (out / "report.html").read_text()
    assert "knew none of these facts" in page and "<script" not in page


def test_a_suite_is_measured_alone(kif, tiny, capsule_file, facts, tmp_path):
    only = ("--suite", "facts", "--form", "chat", "--json")
    result = kif("eval", "-m", tiny.folder, "-c", capsule_file, "--facts", facts, "-o", tmp_path / "out", *only)
    assert result.json["suites"] == ["facts"]
    assert result.json["form"] == "chat"
    assert result.json["neighbours"] is None and result.json["text"] is None


def test_a_summary_for_reading(kif, tiny, capsule_file, facts, tmp_path):
    result = kif("eval", "-m", tiny.folder, "-c", capsule_file, "--facts", facts, "-o", tmp_path / "out")
    assert "neighbours, mean |Δp|" in result.stdout
    assert (tmp_path / "out" / "report.html").as_uri() in result.stdout.replace("\n", "")


def test_an_adapter_counts_as_the_erasure(kif, tiny, facts, tmp_path, tiny_model):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.folder), config).save_pretrained(tmp_path / "adapter")
    neighbours = tmp_path / "neighbours.jsonl"
    neighbours.write_text(json.dumps(FACTS[2]) + "\n")
    files = ("--facts", facts, "--neighbours", neighbours, "-o", tmp_path / "out")
    result = kif("eval", "-m", tiny.folder, "--adapter", tmp_path / "adapter", *files, "--json")
    ids = tiny.tokenizer(FACTS[1]["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        p = float(tiny.model(ids).logits[0, -1].softmax(-1)[tiny.words["paris"]])
    assert [fact["subject"] for fact in result.json["facts"]] == ["japan", "france", "korea"]
    assert result.json["facts"][1]["before"] == pytest.approx(p, rel=1e-3)
    assert result.json["facts"][1]["after"] != pytest.approx(p, rel=1e-2)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ((), "nothing to evaluate"),
        (("-c", "CAPSULE", "--suite", "text"), "--text"),
        (("-c", "CAPSULE", "--facts", "missing.jsonl"), "missing.jsonl"),
        (("-c", "CAPSULE", "--facts", "bad.jsonl"), "line 2"),
        (("-c", "CAPSULE", "--facts", "others.jsonl"), "--neighbours"),
        (("-c", "CAPSULE", "--facts", "FACTS", "--text", "missing.txt"), "missing.txt"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    refused, capsule_file, facts, tmp_path, monkeypatch, extra, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text(json.dumps(FACTS[0]) + "\n{}\n")
    (tmp_path / "others.jsonl").write_text(json.dumps(FACTS[1]) + "\n")
    files = {"CAPSULE": capsule_file, "FACTS": facts}
    line = refused("eval", "-m", "/no/model", "-o", "out", *[files.get(e, e) for e in extra])
    assert said in line and "/no/model" not in line
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_refused_before_anything(refused, capsule_file, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "cannot write" in refused("eval", "-m", "/no/model", "-c", capsule_file, "-o", tmp_path / "file" / "out")


def results(kept):
    rows = [
        {
            "subject": f"s{n}",
            "relation": "r",
            "kind": "place",
            "prompt": f"<i>s{n}</i> is",
            "answer": "a",
            "first": n > 0,
        }
        | {"before": 0.5, "after": 0.1, "prior": 0.1, "kept": value}
        for n, value in enumerate(kept)
    ]
    values = [value for value in kept if value is not None]
    beyond = sum(abs(value) > 0.2 for value in values) / max(1, len(values))
    all_of_them = {"facts": len(values), "subjects": len(values), "beyond": beyond, "beyond_interval": [0.0, 1.0]}
    all_of_them |= {"mean": sum(values) / max(1, len(values)), "interval": [-0.1, 0.1]}
    nothing = {"facts": 0, "subjects": 0}
    return {
        "date": "2026-01-01", "seconds": 3.0, "model": "m", "adapter": None, "max_false_fire": None,
        "suites": ["facts"],
        "capsules": [{"id": "s0", "digest": "0" * 64, "bytes": 9}], "form": "bare", "least_excess": 0.15, "facts": rows,
        "kept": all_of_them, "kept_first": nothing, "kept_later": all_of_them, "neighbours": None, "text": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([0.04, -0.02, None], "Within the goal"),
        ([0.9, 0.8], "Outside the goal"),
        ([0.04, 0.04, 0.04, -0.3], "Outside the goal"),
        ([-0.1, -0.1], "answers fall below guessing"),
    ],
)
def test_the_page_says_in_words_what_was_found(kept, said):
    page = eval_page(results(kept))
    assert said in page
    assert page.count("<svg") == sum(value is not None for value in kept)
    assert "<i>" not in page and "http" not in page
