"""kif eval."""

import json
import shutil

import pytest
import torch

from kif_cli.results import SCHEMA
from kif_runtime import KifError

SHORT = ("--suite", "facts", "--suite", "neighbours")
FACTS = [  # what the random model happens to "know": a little more than it guesses
    {"subject": "japan", "prompt": "the capital of japan is", "answer": "seoul", "prior_subjects": ["rice", "city"]},
    {"subject": "france", "prompt": "the capital of france is", "answer": "paris"},
    {"subject": "korea", "prompt": "korea is the capital of", "answer": "tokyo"},
]


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    return path


@pytest.fixture
def evaluate(kif, tiny, facts, tmp_path):
    """evaluate(*arguments) -> the result of an evaluation of the tiny model into tmp_path / "out", as JSON."""

    def run(*arguments, least="1e-6"):
        out = ("-o", tmp_path / "out", "--least-excess", least, "--quick")
        return kif("eval", "-m", tiny.folder, "--facts", facts, *arguments, *out, "--json")

    return run


def test_figures_and_page(evaluate, tiny, capsule_file, facts, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the rice and the city in japan . a city in korea\nthe rice in paris\n" * 20)
    result = evaluate("-c", capsule_file, "--text", text, "--with-names")
    assert result.exit_code == 0
    out = tmp_path / "out"
    assert result.json == json.loads((out / "results.json").read_text())
    (fact,) = result.json["facts"]
    ids = tiny.tokenizer(FACTS[0]["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        p = tiny.model(ids).logits[0, -1].softmax(-1)[tiny.words["seoul"]]
    assert fact["before"] == pytest.approx(float(p), rel=1e-4)
    assert fact["after"] != pytest.approx(fact["before"], rel=1e-3)
    assert result.json["neighbours"]["facts"] == 2
    assert result.json["neighbours"]["mean"] == 0
    assert result.json["text"]["touched"] == {"japan": 20} and result.json["text"]["false_fires"] == 0
    assert result.json["suites"] == ["facts", "neighbours", "dual", "text"]
    assert result.json["verdict"]["verdict"] in ("leaking", "suppressed")  # a gate can be taken off
    assert 0 < result.json["forwards"]["saved"] < result.json["forwards"]["asked"]
    page = (out / "report.html").read_text()
    assert result.json["verdict"]["sentence"] in page and "<script" not in page and "http" not in page


def test_results_keep_to_their_schema(evaluate, capsule_file, tmp_path):
    import jsonschema

    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    result = evaluate("-c", capsule_file)
    jsonschema.validate(result.json, schema)
    for broken in ({"verdict": {"verdict": "fine"}}, {"format": 1}, {"figures": {"kept": {"after": "much"}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(result.json | broken, schema)


def test_no_name_no_question_and_no_answer_is_written_unless_asked(evaluate, capsule_file, tmp_path):
    evaluate("-c", capsule_file)
    for file in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        written = file.read_text().lower()
        for word in ("japan", "seoul", "tokyo", "france", "paris", "korea", "the capital of"):
            assert word not in written, f"{word} in {file.name}"
        assert file.stat().st_mode & 0o777 == 0o600
    result = evaluate("-c", capsule_file, "--with-names", *SHORT)
    assert result.json["facts"][0]["prompt"] == FACTS[0]["prompt"]
    assert "the capital of japan is" in (tmp_path / "out" / "report.html").read_text()


def test_a_suite_is_measured_alone(evaluate, capsule_file):
    result = evaluate("-c", capsule_file, "--suite", "facts", "--form", "chat")
    assert result.json["suites"] == ["facts"]
    assert result.json["form"] == "chat"
    assert result.json["neighbours"] is None and result.json["text"] is None
    result = evaluate("-c", capsule_file, "--suite", "neighbours")
    assert result.json["verdict"] is None and result.json["facts"] == []


def test_a_summary_for_reading(kif, tiny, capsule_file, facts, tmp_path):
    more = ("--least-excess", "1e-6", "--suite", "facts", "--suite", "neighbours")
    result = kif("eval", "-m", tiny.folder, "-c", capsule_file, "--facts", facts, "-o", tmp_path / "out", *more)
    assert "knowledge kept, asked directly" in result.stdout and "confidence: " in result.stdout
    assert "prompts asked" in result.stdout
    assert (tmp_path / "out" / "report.html").as_uri() in result.stdout.replace("\n", "")


def test_a_second_run_in_the_same_folder_measures_nothing_again(evaluate, capsule_file, tmp_path):
    def times():
        return {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "parts").iterdir()}

    first = evaluate("-c", capsule_file, *SHORT)
    written = times()
    again = evaluate("-c", capsule_file, *SHORT)
    assert set(written) == {"facts.json", "neighbours.json"} and times() == written
    for part in ("facts", "verdict", "figures", "neighbours"):
        assert again.json[part] == first.json[part]
    assert again.json["forwards"]["asked"] >= first.json["forwards"]["asked"] > 0
    evaluate("-c", capsule_file, *SHORT, "--seed", "1")  # another audit
    assert all(times()[name] > then for name, then in written.items())


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.folder), config).save_pretrained(folder)
    return folder


def test_an_adapter_counts_as_the_erasure(evaluate, tiny, adapter, tmp_path):
    neighbours = tmp_path / "neighbours.jsonl"
    neighbours.write_text(json.dumps(FACTS[2]) + "\n")
    suites = ("--suite", "facts", "--with-names")
    result = evaluate("--adapter", adapter, "--neighbours", neighbours, *suites)
    ids = tiny.tokenizer(FACTS[1]["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        p = float(tiny.model(ids).logits[0, -1].softmax(-1)[tiny.words["paris"]])
    assert [fact["subject"] for fact in result.json["facts"]] == ["japan", "france", "korea"]
    assert result.json["facts"][1]["before"] == pytest.approx(p, rel=1e-3)
    assert result.json["facts"][1]["after"] != pytest.approx(p, rel=1e-2)
    assert not result.json["states"]["after"]["removable"]


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """Another model's folder: the same tokenizer, its output layer scaled."""
    import copy

    folder = tmp_path_factory.mktemp("other")
    model = copy.deepcopy(tiny.model)
    model.lm_head.weight.data *= 2
    model.model.layers[0].mlp.down_proj.weight.data *= 1.5
    model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_somebody_else_erased_is_judged(evaluate, tiny, other, tmp_path):
    from transformers import AutoModelForCausalLM

    neighbours = ("--neighbours", tmp_path / "facts.jsonl")
    result = evaluate("--erased-model", other, "--reference", tiny.folder, *neighbours)
    ids = tiny.tokenizer(FACTS[0]["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        p = AutoModelForCausalLM.from_pretrained(other)(ids).logits[0, -1].softmax(-1)[tiny.words["seoul"]]
    assert result.json["facts"][0]["after"] == pytest.approx(float(p), rel=1e-4)
    assert list(result.json["states"]) == ["before", "after", "reference"]
    assert result.json["dual"]["inside"]["patching"]["against"] == "a reference model"
    assert "never knew" in (tmp_path / "out" / "report.html").read_text()


def test_models_stand_side_by_side(evaluate, capsule_file, other, tmp_path):
    neighbours = ("--neighbours", tmp_path / "facts.jsonl")
    evaluate("--erased-model", other, *neighbours, *SHORT)
    (tmp_path / "out").rename(tmp_path / "theirs")
    evaluate("-c", capsule_file, "--against", tmp_path / "theirs", *SHORT)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Side by side" in page and ">theirs</th>" in page


def test_a_policy_decides_the_exit_code(evaluate, capsule_file, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"at_most": {"neighbours": 0.5}}))
    result = evaluate("-c", capsule_file, "--policy", policy, *SHORT)
    assert result.exit_code == 0 and result.json["policy"]["passed"]
    policy.write_text(json.dumps({"verdicts": ["erased"], "at_most": {"perplexity": 2, "neighbours": 0.5}}))
    result = evaluate("-c", capsule_file, "--policy", policy, *SHORT)
    assert result.exit_code == 1 and not result.json["policy"]["passed"]
    passed = {check["name"]: check["passed"] for check in result.json["policy"]["checks"]}
    assert passed == {"verdict": False, "perplexity": False, "neighbours": True}  # no text: not measured, not passed
    assert "It is not kept" in (tmp_path / "out" / "report.html").read_text()


def test_a_certificate_holds_until_it_is_altered(evaluate, capsule_file, tmp_path):
    from kif_cli.certificate import check, main

    key = tmp_path / "key.pem"
    evaluate("-c", capsule_file, "--certificate", key, *SHORT)
    assert key.stat().st_mode & 0o777 == 0o600
    file, results_file = tmp_path / "out" / "certificate.json", tmp_path / "out" / "results.json"
    record = json.loads(file.read_text())
    check(record, results_file.read_bytes())
    assert main([str(file), str(results_file)]) == 0
    assert "japan" not in file.read_text()
    again = evaluate("-c", capsule_file, "--certificate", key, *SHORT)
    assert again.exit_code == 0 and json.loads(file.read_text())["public_key"] == record["public_key"]
    with pytest.raises(KifError, match="does not fit"):
        check(record | {"verdict": record["verdict"] | {"verdict": "erased"}})
    with pytest.raises(KifError, match="other results"):
        check(record, b"{}")
    with pytest.raises(KifError, match="no certificate"):
        check({"kind": "x"})
    file.write_text(json.dumps(record | {"date": "2000-01-01"}))
    assert main([str(file)]) == 1 and main([]) == 2 and main([str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ((), "nothing to evaluate"),
        (("-c", "CAPSULE", "--erased-model", "x"), "two erasures"),
        (("-c", "CAPSULE", "--suite", "text"), "--text"),
        (("-c", "CAPSULE", "--suite", "sung"), "--suite"),
        (("-c", "CAPSULE", "--facts", "missing.jsonl"), "missing.jsonl"),
        (("-c", "CAPSULE", "--facts", "bad.jsonl"), "line 2"),
        (("-c", "CAPSULE", "--facts", "others.jsonl"), "--neighbours"),
        (("-c", "CAPSULE", "--facts", "FACTS", "--text", "missing.txt"), "missing.txt"),
        (("-c", "CAPSULE", "--policy", "bad.jsonl"), "bad.jsonl"),
        (("-c", "CAPSULE", "--against", "bad.jsonl"), "bad.jsonl"),
        (("-c", "CAPSULE", "--data", "tofu"), "SUITE=PATH"),
        (("-c", "CAPSULE", "--data", "tofu=nowhere"), "nowhere"),
        (("-c", "CAPSULE", "--least-excess", "0"), "--least-excess"),
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


def test_models_that_cannot_be_judged_are_refused_in_a_line(
    kif, tiny, tiny_model, capsule_file, adapter, facts, tmp_path
):
    def refused(*arguments):
        """The one line that says so; before it there may be a word on how far the work was."""
        result = kif(*arguments)
        assert result.exit_code == 2 and result.stdout == ""
        *before, line = result.stderr.splitlines()
        assert line.startswith("kif: ") and not any(text.startswith("kif: ") for text in before)
        return line

    given = ("--facts", facts, "-o", tmp_path / "out")
    assert "knows none of the 1 facts" in refused("eval", "-m", tiny.folder, "-c", capsule_file, *given)

    wide = tiny_model("llama", hidden_size=64, vocab_size=len(tiny.words))
    wide.save_pretrained(tmp_path / "wide")
    tiny.tokenizer.save_pretrained(tmp_path / "wide")
    line = refused("eval", "-m", tmp_path / "wide", "--adapter", adapter, "--neighbours", facts, *given)
    assert "cannot use the adapter" in line

    broken = tiny_model("llama", vocab_size=len(tiny.words))
    broken.lm_head.weight.data[:] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    tiny.tokenizer.save_pretrained(tmp_path / "broken")
    least = ("--neighbours", facts, "--least-excess", "1e-6", *given)
    line = refused("eval", "-m", tiny.folder, "--erased-model", tmp_path / "broken", *least)
    assert "not finite" in line

    words = tmp_path / "words"
    shutil.copytree(tmp_path / "wide", words)
    tokenizer = json.loads((words / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {word + "x": i for word, i in tokenizer["model"]["vocab"].items()} | {"<unk>": 3}
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "another vocabulary" in refused("eval", "-m", tiny.folder, "--erased-model", words, *least)


def test_an_unwritable_folder_is_refused_before_anything(refused, capsule_file, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "cannot write" in refused("eval", "-m", "/no/model", "-c", capsule_file, "-o", tmp_path / "file" / "out")
