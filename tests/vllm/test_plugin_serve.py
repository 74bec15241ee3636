"""kif serve: everything is checked before the engine starts, and the user's own flags and plugins stay."""

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import kif_vllm.serve as serve
from kif_cli.main import app
from kif_runtime import Capsule
from kif_runtime.errors import KifError
from kif_vllm.config import ConfigError, KifConfig


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


@pytest.mark.parametrize("flag", ["--additional-config", "--additional_config", "--additional-config="])
def test_the_users_own_additional_config_is_kept(model, folder, flag):
    own = json.dumps({"other": 1, "kif": {"mandatory": ["it"], "watch": 0}})
    flags = [flag + own] if flag.endswith("=") else [flag, own]
    launch = prepare(model, folder, flags)
    assert additional(launch) == {"other": 1, "kif": {"mandatory": ["it"], "watch": 0, "capsules": str(folder)}}
    assert sum(part.startswith("--additional") for part in launch.command) == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--additional-config.other", "1"],
        ["--additional_config.kif.watch=0"],
        ["--additional-config.other+", "a,b"],
        ["--additional-conf", '{"other": 1}'],
        ["--additional_c.other", "1"],
    ],
)
def test_a_flag_that_vllm_would_read_in_place_of_the_kif_table_is_refused(model, folder, flags):
    with pytest.raises(KifError, match="for all of --additional-config; write that as one JSON object"):
        prepare(model, folder, ["--port", "1", *flags])


@pytest.mark.parametrize("line", ["additional-config.other: 1", "additional_config: {other: 1}"])
def test_a_file_of_flags_that_sets_it_is_refused(model, folder, tmp_path, line):
    path = tmp_path / "flags.yaml"
    path.write_text(f"port: 1\n{line}\n")
    with pytest.raises(KifError, match="--config"):
        prepare(model, folder, ["--config", str(path)])
    path.write_text("port: 1\n")
    assert str(path) in prepare(model, folder, ["--config", str(path)]).command


def test_a_server_whose_kif_table_was_lost_on_the_way_does_not_start(model, folder, monkeypatch):
    for name, value in prepare(model, folder).environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="no kif table reached it"):
        KifConfig.of(SimpleNamespace(additional_config={"other": 1}))


@pytest.mark.slow
def test_vllms_own_parser_finds_the_kif_table(model, folder):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    launch = prepare(model, folder, ["--additional_config", '{"other": 1}', "--max-model-len", "64"])
    given = launch.command[launch.command.index("--max-model-len") :]
    assert parser.parse_args(given).additional_config == {"other": 1, "kif": {"capsules": str(folder)}}
    for flags in (["--additional-conf", "{}"], ["--ad", "{}"], ["--additional-conf.other", "1"]):
        assert "kif" not in parser.parse_args([*given, *flags]).additional_config  # why these are refused
        with pytest.raises(KifError):
            prepare(model, folder, flags)


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
