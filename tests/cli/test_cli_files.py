"""kif show and kif validate."""

import pytest

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
