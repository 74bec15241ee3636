"""kif serve: everything is checked before the engine starts, and the user's own flags and plugins stay."""

import json

import pytest
from typer.testing import CliRunner

import kif_vllm.serve as serve
from kif_cli.main import app
from kif_runtime import Capsule
from kif_runtime.errors import KifError


@pytest.fixture
def model(tmp_path, tiny_model):
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, model):
    """A directory with one capsule made for the model."""
    import torch

    from kif_runtime import Signature
    from kif_runtime.fingerprint import checkpoint_fingerprint

    place = tmp_path / "capsules"
    place.mkdir()
    basis = torch.eye(32)[:2].contiguous()
    signature = Signature(1, "last", torch.ones(32), torch.tensor(-1.0), basis, torch.zeros(2), torch.tensor(1.0))
    Capsule("it", (signature,), checkpoint_fingerprint(model), 32, 4).save(place / "it.kif.safetensors")
    return place


def prepare(model, folder, flags=(), environment=None):
    return serve.prepare(str(model), folder, list(flags), environment or {})


def additional(launch):
    return json.loads(launch.command[launch.command.index("--additional-config") + 1])


def test_the_command_names_the_model_the_flags_and_the_directory(model, folder):
    launch = prepare(model, folder, ["--port", "1", "--enforce-eager"])
    assert str(model) in launch.command
    assert launch.command[launch.command.index("--port") + 1] == "1"
    assert "--enforce-eager" in launch.command
    assert additional(launch) == {"kif": {"capsules": str(folder)}}


@pytest.mark.parametrize("form", ["two", "one"])
def test_the_users_own_additional_config_is_kept(model, folder, form):
    own = json.dumps({"other": 1, "kif": {"mandatory": ["it"], "watch": 0}})
    flags = ["--additional-config", own] if form == "two" else [f"--additional-config={own}"]
    launch = prepare(model, folder, flags)
    assert additional(launch) == {"other": 1, "kif": {"mandatory": ["it"], "watch": 0, "capsules": str(folder)}}
    assert sum("--additional-config" in part for part in launch.command) == 1


def test_plugins_that_load_by_themselves_are_named_too_and_a_users_choice_is_kept(model, folder, monkeypatch):
    class Point:
        def __init__(self, name):
            self.name = name

    installed = {"vllm.general_plugins": [Point("kif"), Point("theirs")], "vllm.endpoint_plugins": [Point("exposed")]}
    monkeypatch.setattr(serve, "entry_points", lambda group: installed.get(group, []))
    assert prepare(model, folder).environment["VLLM_PLUGINS"].split(",") == ["kif", "theirs"]
    chosen = prepare(model, folder, environment={"VLLM_PLUGINS": "one"})
    assert chosen.environment["VLLM_PLUGINS"] == "one,kif"
    assert prepare(model, folder, environment={"VLLM_PLUGINS": "kif"}).environment["VLLM_PLUGINS"] == "kif"
    assert prepare(model, folder, environment={"VLLM_PLUGINS": ""}).environment["VLLM_PLUGINS"] == "kif"


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--additional-config", "{"], "JSON"),
        (["--additional-config", "[]"], "JSON"),
        (["--additional-config"], "JSON"),
        (["--additional-config", '{"kif": 3}'], "kif"),
        (["--additional-config", '{"kif": {"unknown": 3}}'], "unknown"),
        (["--additional-config", '{"kif": {"mandatory": ["nobody"]}}'], "nobody"),
    ],
)
def test_wrong_configuration_is_refused_before_anything_starts(model, folder, flags, word):
    with pytest.raises(KifError, match=word):
        prepare(model, folder, flags)


def test_a_capsule_of_another_model_is_refused_before_anything_starts(tmp_path, folder, tiny_model):
    other = tmp_path / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    with pytest.raises(KifError, match=r"it\.kif\.safetensors"):
        prepare(other, folder)


def test_an_empty_directory_needs_sites(model, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(KifError, match="sites"):
        prepare(model, tmp_path / "none")
    own = json.dumps({"kif": {"sites": [1]}})
    assert additional(prepare(model, tmp_path / "none", ["--additional-config", own]))["kif"]["sites"] == [1]


def test_refusals_are_one_line_and_exit_code_2(model, tmp_path):
    result = CliRunner().invoke(app, ["serve", str(model), "--capsules", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_verify_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("KIF_ADMIN_KEY", raising=False)
    assert "KIF_ADMIN_KEY" in CliRunner().invoke(app, ["verify"]).stderr
    monkeypatch.setenv("KIF_ADMIN_KEY", "k")
    answer = CliRunner().invoke(app, ["verify", "--url", "http://127.0.0.1:9"])
    assert answer.exit_code == 2
    assert "no answer" in answer.stderr
    assert CliRunner().invoke(app, ["verify", "--url", "file:///etc/passwd"]).exit_code == 2
