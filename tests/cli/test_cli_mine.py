"""kif mine, around a stand-in for the mining itself, which has tests of its own."""

import copy
import json
import resource
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model

from kif_runtime import Capsule
from kif_runtime.capsule import opaque_id, slug
from kif_runtime.ids import marks


@pytest.fixture
def capsule(capsule):
    """One that tells Japan from its homonyms."""
    return replace(capsule, provenance={"settings": {"forms": marks("japan", ["Japan"])}})


@pytest.fixture
def mining(monkeypatch, capsule):
    """Replaces kif_runtime.mining; `asked` and `prepared` collect the keywords that the command passes on."""
    asked: list[dict] = []
    prepared: list[dict] = []

    def mine(model, tokenizer, name, *, progress=None, **options):
        asked.append({"name": name} | options)
        progress(1, 2, "reading controls")
        if stand_in.interrupt:
            raise KeyboardInterrupt
        kept = {"name": name, "aliases": options["aliases"]} if options["keep_name"] else {}
        calibration = {"recall": 0.75, "kind": "place", "warnings": ["low recall"]}
        return replace(capsule, id=opaque_id() if options["private"] else slug(name), calibration=calibration, **kept)

    def mine_batch(model, tokenizer, requests, out, *, progress=None, **options):
        asked.append(options)
        replace(capsule, id="one").save(out / "one.kif.safetensors")
        return SimpleNamespace(done=[1], skipped=[2], failed=[(3, "the name is empty")])

    stand_in = SimpleNamespace(
        mine=mine, mine_batch=mine_batch, asked=asked, interrupt=False, prepared=prepared,
        prepare=lambda model, tokenizer, **options: prepared.append(options),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "kif_runtime.mining", stand_in)
    return stand_in


def test_the_capsule_is_written_and_told_of(kif, tiny, mining, tmp_path):
    path = tmp_path / "x.kif.safetensors"
    result = kif("mine", "Japan", "-m", tiny.folder, "-o", path, "--alias", "Nippon", "--kind", "place")
    assert result.exit_code == 0
    assert Capsule.load(path).id == "japan"
    assert "2 signatures at blocks 0, 1" in result.stdout and "recall, held out: 0.750" in result.stdout
    assert "warning: low recall" in result.stderr
    assert "reading controls: 1 of 2" in result.stderr  # a plain line: this is no terminal
    (asked,) = mining.asked
    assert asked["aliases"] == ("Nippon",) and asked["kind"] == "place" and asked["method"] == "fisher"


def test_other_cases_are_mined_only_where_asked(kif, tiny, mining, tmp_path):
    assert kif("mine", "Japan", "-m", tiny.folder, "-o", tmp_path, "--any-case").exit_code == 0
    assert kif("mine", "Japan", "-m", tiny.folder, "-o", tmp_path).exit_code == 0
    assert [asked["any_case"] for asked in mining.asked] == [True, False]


def test_the_site_asked_for_is_prepared_and_mined_at(kif, tiny, mining, tmp_path):
    assert kif("mine", "Japan", "-m", tiny.folder, "-o", tmp_path, "--site", "2").exit_code == 0
    assert kif("mine", "Japan", "-m", tiny.folder, "-o", tmp_path).exit_code == 0
    assert [asked["site"] for asked in mining.asked] == [asked["site"] for asked in mining.prepared] == [2, None]


def test_an_adapter_is_put_on_and_mined_under(kif, tiny, mining, tmp_path):
    get_peft_model(copy.deepcopy(tiny.model), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    arguments = ("mine", "Japan", "-m", tiny.folder, "-o", tmp_path)
    assert kif(*arguments, "--adapter", tmp_path / "lora").exit_code == 0
    assert kif(*arguments).exit_code == 0
    assert [asked["adapted"] for asked in mining.asked] == [True, False]


@pytest.mark.parametrize("folder", [".", "new/folder"])
def test_into_a_folder_the_file_is_named_by_its_id(kif, tiny, mining, tmp_path, folder):
    result = kif("mine", "New Japan", "-m", tiny.folder, "-o", tmp_path / folder, "--json")
    assert result.json["file"] == str(tmp_path / folder / "new-japan.kif.safetensors")
    assert result.json["capsule"]["calibration"]["recall"] == 0.75
    assert Capsule.load(result.json["file"]).id == "new-japan"


def test_a_private_subject_leaves_its_name_nowhere(kif, tiny, mining, tmp_path):
    options = ("--private", "--alias", "Zz-Alias")
    result = kif("mine", "Zanzibar Quux", "-m", tiny.folder, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0
    (file,) = (tmp_path / "out").iterdir()
    everything = result.stdout + result.stderr + file.name + file.read_bytes().decode("latin-1")
    for trace in ("zanzibar", "quux", "zz-alias"):
        assert trace not in everything.lower()


def test_a_name_is_stored_when_asked(kif, tiny, mining, tmp_path):
    path = tmp_path / "x.kif.safetensors"
    kif("mine", "Japan", "-m", tiny.folder, "-o", path, "--with-name", "--alias", "Nippon")
    assert (Capsule.load(path).name, Capsule.load(path).aliases) == ("Japan", ("Nippon",))


def test_prompts_controls_and_own_text_are_read_from_files(kif, tiny, mining, tmp_path):
    prompts, controls, text = (tmp_path / name for name in ("prompts.txt", "controls.txt", "text.txt"))
    text.write_text("One line asked.\n\nAnother.\n")
    prompts.write_text("{} is\n\n  the city of {}  \n", encoding="utf-8-sig")
    controls.write_text("Korea\nÅland\n")
    files = ("--prompts", prompts, "--controls", controls, "--text", text)
    assert kif("mine", "Japan", "-m", tiny.folder, "-o", tmp_path, *files).exit_code == 0
    assert mining.asked[0]["prompts"] == ["{} is", "the city of {}"]
    assert mining.asked[0]["controls"] == ["Korea", "Åland"]
    assert mining.asked[0]["passages"] == ["One line asked.", "Another."]


def test_an_interruption_writes_nothing(refused_after_work, tiny, mining, tmp_path):
    mining.interrupt = True
    out = tmp_path / "out"
    assert refused_after_work("mine", "Japan", "-m", tiny.folder, "-o", out) == "kif: interrupted; nothing written"
    assert not out.exists()


@contextmanager
def no_room():
    """The system lets no file grow over 1,000 bytes: the refusal of a write that a full disk is, too.

    Around the command alone, for pytest's own output may be a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("earlier", [False, True])
def test_where_there_is_no_room_nothing_is_half_written(refused_after_work, tiny, mining, capsule, tmp_path, earlier):
    path = tmp_path / "japan.kif.safetensors"
    if earlier:
        capsule.save(path)
    before = [(p, p.read_bytes()) for p in tmp_path.iterdir()]
    with no_room():
        told = refused_after_work("mine", "Japan", "-m", tiny.folder, "-o", path)
    assert told.startswith("kif: cannot write") and "nothing was written" in told
    assert [(p, p.read_bytes()) for p in tmp_path.iterdir()] == before


@pytest.fixture
def refused_after_work(kif):
    def run(*arguments):
        result = kif(*arguments)
        assert result.exit_code == 2 and result.stdout == ""
        return result.stderr.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ("", "-o", "x.kif.safetensors"),
        ("  ", "-o", "x.kif.safetensors"),
        ("!!!", "-o", "x.kif.safetensors"),
        ("-o", "x.kif.safetensors"),
        ("Japan", "--batch", "requests.jsonl", "-o", "x"),
        ("Japan", "-o", "missing/x.kif.safetensors"),
        ("Japan", "-o", "a-file/x.kif.safetensors"),
        ("Japan", "-o", "a-file/folder"),
        ("Japan", "-o", "korea.kif.safetensors"),
        ("Japan", "-o", "notes.txt"),
        ("Japan", "--private", "-o", "japan.kif.safetensors"),
        ("Japan", "--private", "--with-name", "-o", "x"),
        ("Japan", "--false-positive-rate", "0", "-o", "x"),
        ("Japan", "--false-positive-rate", "nan", "-o", "x"),
        ("Japan", "--controls", "missing.txt", "-o", "x"),
        ("Japan", "--prompts", "empty.txt", "-o", "x"),
        ("Japan", "--text", "empty.txt", "-o", "x"),
        ("Japan", "--prompts", "binary.txt", "-o", "x"),
        ("--batch", "missing.jsonl", "-o", "x"),
        ("--batch", "notes.txt", "-o", "notes.txt"),
        ("--batch", "notes.txt", "--alias", "y", "-o", "x"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    refused, mining, capsule, tmp_path, monkeypatch, arguments
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("x")
    (tmp_path / "notes.txt").write_text("not a capsule")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00{}")
    replace(capsule, id="korea").save("korea.kif.safetensors")
    capsule.save("japan.kif.safetensors")
    before = sorted(tmp_path.rglob("*"))
    assert "/no/model" not in refused("mine", *arguments, "-m", "/no/model")
    assert not mining.asked
    assert sorted(tmp_path.rglob("*")) == before


def test_the_same_subject_is_mined_again_into_its_file(kif, tiny, mining, capsule_file):
    assert kif("mine", "Japan", "-m", tiny.folder, "-o", capsule_file).exit_code == 0


def test_a_subject_of_the_same_slug_does_not_replace_it(refused, mining, capsule_file):
    before = capsule_file.read_bytes()
    for output in (capsule_file, capsule_file.parent):
        assert "another subject" in refused("mine", "Japan!", "-m", "/no/model", "-o", output)
    assert capsule_file.read_bytes() == before and not mining.asked


def test_a_batch_reports_every_bad_line(kif, tiny, mining, tmp_path):
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps({"name": n}) + "\n" for n in ("one", "two", "")))
    result = kif("mine", "--batch", requests, "-m", tiny.folder, "-o", tmp_path / "all", "--method", "kif-paper")
    assert result.exit_code == 2
    assert "1 mined, 1 there already, 1 failed" in result.stdout
    assert result.stderr.splitlines()[-1] == f"kif: {requests}, line 3: the name is empty"
    assert Capsule.load(tmp_path / "all" / "one.kif.safetensors").id == "one"
    assert mining.asked[0]["method"] == "kif-paper"
