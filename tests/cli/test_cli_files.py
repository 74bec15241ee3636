"""kif show and kif validate."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import capsules


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "new-york.kif.safetensors"
    capsules.capsule().save(path)
    return path


def test_show_prints_what_the_file_holds(kif, file):
    meta, tensors = capsules.file_parts(file)
    (shown,) = kif("show", file, "--json").json["capsules"]
    assert shown["file"] == str(file)
    for key in ("id", "name", "aliases", "model", "width", "blocks", "calibration", "provenance"):
        assert shown[key] == meta[key]
    assert shown["bytes"] == sum(t.numel() * 4 for t in tensors.values())
    assert shown["sites"] == [1, 3]
    assert [s["rank"] for s in shown["signatures"]] == [len(tensors[f"signature.{n}.basis"]) for n in (0, 1)]
    assert [s["gate"] for s in shown["signatures"]] == ["hard", "soft"]


def test_show_is_readable_and_takes_names_literally(kif, tmp_path):
    path = tmp_path / "x.kif.safetensors"
    capsules.capsule(name="[bold]New[/] York :smile:").save(path)
    result = kif("show", path)
    assert result.exit_code == 0
    assert "[bold]New[/] York :smile:" in result.stdout
    assert "2 signatures at blocks 1, 3, rank 2" in result.stdout
    assert "soft k=1.6 τ=3" in result.stdout


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "other":
        path.write_text("hello")


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "folder", "other"])
@pytest.mark.parametrize("command", ["show", "validate"])
def test_a_bad_file_is_one_line_that_names_it(refused, file, command, how):
    damage(file, how)
    assert file.name in refused(command, file)


def test_validate_looks_at_every_file(kif, file, tmp_path):
    bad, good = tmp_path / "bad.kif.safetensors", tmp_path / "good.kif.safetensors"
    bad.write_bytes(file.read_bytes()[:-5])
    good.write_bytes(file.read_bytes())
    result = kif("validate", bad, good)
    assert result.exit_code == 2
    assert result.stdout == f"ok  {good}  new-york\n"
    assert result.stderr.startswith(f"kif: {bad}: ")


def test_validate_as_json(kif, file):
    result = kif("validate", file, "--json")
    assert result.exit_code == 0
    entry = {"file": str(file), "valid": True, "id": "new-york", "error": None}
    assert result.json == {"valid": True, "model": None, "files": [entry]}


def test_validate_against_a_model(kif, tiny, capsule_file, file):
    assert kif("validate", capsule_file, "--model", tiny.folder).exit_code == 0
    result = kif("validate", file, "--model", tiny.folder)
    assert result.exit_code == 2
    assert "made for another model" in result.stderr


@pytest.fixture
def adapter(tiny, tmp_path):
    """adapter(size) -> a folder with a random LoRA adapter; of size 0 it changes nothing."""

    def save(size):
        torch.manual_seed(4)
        config = LoraConfig(r=4, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(copy.deepcopy(tiny.model), config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data *= size
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


def test_validate_tells_whether_thresholds_hold_under_an_adapter(kif, tiny, capsule_file, adapter):
    arguments = ("validate", capsule_file, "--model", tiny.folder, "--name", "japan")
    same = kif(*arguments, "--adapter", adapter(0.0), "--json")
    assert same.exit_code == 0
    (found,) = same.json["files"]
    assert found["holds"] and found["with"] == found["without"]
    assert found["with"]["recall"] > 0.8 and found["with"]["false_fires"] == 0.0
    other = kif(*arguments, "--adapter", adapter(5.0))
    assert other.exit_code == 1
    assert "names recognised" in other.stdout and "kif mine NAME --adapter" in other.stdout


def test_validate_refuses_an_adapter_without_a_model_and_one_name_for_many(refused, tiny, capsule_file, adapter):
    folder = adapter(0.0)
    assert "--model" in refused("validate", capsule_file, "--adapter", folder)
    both = (capsule_file, capsule_file, "--model", tiny.folder, "--adapter", folder, "--name", "japan")
    assert "one by one" in refused("validate", *both)
