"""kif bake and kif retire."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kif_runtime import Capsule
from kif_runtime.errors import BakingError
from kif_runtime.mining.corpus import ANY

QUICK = ("--steps", "1", "--rank", "2")


@pytest.fixture
def baked(kif, tiny, capsule_file, tmp_path):
    out = tmp_path / "adapter"
    result = kif("bake", "-m", tiny.folder, "-c", capsule_file, "--name", "japan", "-o", out, *QUICK, "--json")
    assert result.exit_code == 0
    return SimpleNamespace(folder=out, json=result.json, stderr=result.stderr)


def test_an_adapter_is_written_and_told_of(baked, capsule_file):
    assert json.loads((baked.folder / "kif.json").read_text()) == baked.json["provenance"]
    assert baked.json["provenance"]["capsules"] == [Capsule.load(capsule_file).digest]
    assert baked.json["bytes"] == (baked.folder / "adapter_model.safetensors").stat().st_size
    assert "baking: 0 of 1" in baked.stderr


def test_the_other_commands_use_it(kif, tiny, baked):
    plain = kif("generate", "-m", tiny.folder, "--json", "the capital of japan is")
    result = kif("generate", "-m", tiny.folder, "--adapter", baked.folder, "--json", "the capital of japan is")
    assert result.exit_code == 0
    assert plain.json["results"][0]["prompt"] == result.json["results"][0]["prompt"]


def test_a_summary_for_reading(kif, tiny, capsule_file, tmp_path):
    result = kif("bake", "-m", tiny.folder, "-c", capsule_file, "--name", "japan", "-o", tmp_path / "x", *QUICK)
    assert result.exit_code == 0
    assert "1 subject baked in" in result.stdout and "rank 1, " in result.stdout
    assert "japan" not in result.stdout + result.stderr


@pytest.fixture
def asked(monkeypatch):
    """What the command hands to bake()."""
    found = {}

    def make(model, tokenizer, capsules, out, **options):
        found.update(options)
        raise BakingError("stop here")

    monkeypatch.setattr("kif_runtime.bake.bake", make)
    return found


def test_names_come_from_the_file_that_was_mined_from(refused, tiny, capsule_file, asked, tmp_path):
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"name": "Japan", "aliases": ["Nippon"]}\n{"name": "Peru"}\n')
    refused("bake", "-m", tiny.folder, "-c", capsule_file, "--requests", requests, "-o", tmp_path / "x")
    assert asked["names"] == {"japan": ["Japan", "Nippon"]}


def test_options_reach_the_objective(refused, tiny, capsule_file, asked, tmp_path):
    more = ("--option", "retain=2.5", "--option", "beyond=1", "--seed", 7, "--learning-rate", "0.01")
    refused("bake", "-m", tiny.folder, "-c", capsule_file, "--name", "japan", "-o", tmp_path / "x", *more)
    assert (asked["objective"].retain, asked["objective"].beyond, asked["seed"]) == (2.5, 1, 7)
    assert asked["settings"] == {"learning_rate": 0.01}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--name", "japan", "--name", "korea"), "1 capsules and 2 names"),
        (("--alias", "nippon"), "--alias is for one subject"),
        (("--name", "japan", "--requests", "r.jsonl"), "not both"),
        (("--name", "japan", "--objective", "hope"), "unknown objective 'hope'"),
        (("--name", "japan", "--option", "retain"), "is not NAME=VALUE"),
        (("--name", "japan", "--option", "hope=1"), "has no option 'hope'"),
        (("--name", "japan", "--rank", "99"), "rank 99 does not fit"),
        (("--name", "japan", "--durability", "hope"), "no durability term 'hope'"),
        (("--name", "japan", "--data", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
        (("--name", "japan", "--continue-from", "nowhere"), "nowhere holds no LoRA adapter"),
    ],
)
def test_bad_input_is_one_line(refused, tiny, capsule_file, tmp_path, arguments, told):
    import re

    line = refused("bake", "-m", tiny.folder, "-c", capsule_file, "-o", tmp_path / "x", *arguments)
    assert re.search(told, line)


def test_the_name_that_the_id_spells_is_taken_if_the_capsule_recognises_it(
    kif, refused, tiny, capsule_file, tmp_path, monkeypatch
):
    templates = {ANY: ("the capital of {} is", "people in {} eat rice", "what is {} ?")}  # words that `tiny` knows
    monkeypatch.setattr("kif_runtime.bake.naming.corpus", lambda: SimpleNamespace(templates=templates))
    result = kif("bake", "-m", tiny.folder, "-c", capsule_file, "-o", tmp_path / "x", *QUICK)
    assert result.exit_code == 0 and "japan" not in result.stdout + result.stderr
    for id in ("korea", "0" * 32):  # what it does not fire on; a private id
        other = tmp_path / f"{id}.kif.safetensors"
        replace(Capsule.load(capsule_file), id=id).save(other)
        line = refused("bake", "-m", tiny.folder, "-c", other, "-o", tmp_path / "y", *QUICK)
        assert "holds no name" in line and "give it with --name" in line


def test_nothing_to_bake_and_a_full_folder_are_one_line(refused, tiny, capsule_file, tmp_path):
    assert "nothing to bake" in refused("bake", "-m", tiny.folder, "-o", tmp_path / "x")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("mine")
    line = refused("bake", "-m", tiny.folder, "-c", capsule_file, "--name", "japan", "-o", tmp_path / "x")
    assert "is not empty (notes.txt is there)" in line


def test_an_interruption_says_how_to_go_on(refused, tiny, capsule_file, tmp_path, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("kif_runtime.bake.bake", stop)
    line = refused("bake", "-m", tiny.folder, "-c", capsule_file, "--name", "japan", "-o", tmp_path / "x")
    assert line == "kif: interrupted; run the same command to go on from the last checkpoint"


def test_a_capsule_retires_where_the_adapter_does_its_work(kif, tiny, capsule_file, baked, monkeypatch):
    monkeypatch.setattr("kif_runtime.bake.retiring.left", lambda *args: {"forget": 0.03, "retain": 0.0})
    result = kif("retire", capsule_file, "-m", tiny.folder, "--adapter", baked.folder, "--name", "japan", "--json")
    assert (result.exit_code, result.json["passed"]) == (0, True)
    assert not capsule_file.exists() and result.json["moved_to"] == f"{capsule_file}.retired"
    assert Capsule.load(result.json["moved_to"]).id == "japan"


def test_it_is_deleted_when_asked(kif, tiny, capsule_file, baked, monkeypatch):
    monkeypatch.setattr("kif_runtime.bake.retiring.left", lambda *args: {"forget": 0.03, "retain": 0.0})
    arguments = (capsule_file, "-m", tiny.folder, "--adapter", baked.folder, "--name", "japan", "--delete")
    result = kif("retire", *arguments)
    assert result.exit_code == 0 and "is deleted" in result.stdout
    assert list(capsule_file.parent.glob("*.safetensors*")) == []


def test_it_stays_where_the_adapter_does_not(kif, tiny, capsule_file, baked):
    arguments = (capsule_file, "-m", tiny.folder, "--adapter", baked.folder, "--name", "japan")
    result = kif("retire", *arguments, "--most-left", "-1")  # really measured; nothing can be below
    assert result.exit_code == 1 and "stays in service" in result.stdout
    assert capsule_file.exists()


def test_a_capsule_that_the_adapter_is_not_from_stays(refused, tiny, capsule_file, baked, tmp_path):
    told = json.loads((baked.folder / "kif.json").read_text())
    (baked.folder / "kif.json").write_text(json.dumps(told | {"capsules": ["0" * 64]}))
    arguments = ("-m", tiny.folder, "--adapter", baked.folder, "--name", "japan")
    assert "was not baked from this capsule" in refused("retire", capsule_file, *arguments)
    (baked.folder / "kif.json").unlink()
    assert "holds no kif.json" in refused("retire", capsule_file, *arguments)
    assert capsule_file.exists()
