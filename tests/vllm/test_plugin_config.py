"""The server's KIF configuration: strict, and one line for each thing that is wrong."""

import json

import pytest

from kif_vllm.config import ConfigError, KifConfig, read_allowed


def test_the_directory_alone_is_enough_and_everything_in_it_is_mandatory(tmp_path):
    config = KifConfig.parse({"capsules": str(tmp_path)})
    assert config.capsules == tmp_path
    assert config.mandatory == "all"
    assert config.sites is None
    assert not config.prompt_embeds
    assert not config.multimodal


def test_every_key_is_read(tmp_path):
    table = {
        "capsules": str(tmp_path), "mandatory": ["b", "a", "b"], "sites": [5, 3, 5], "max_capsules": 10,
        "max_signatures": 20, "max_rank": 3, "max_named": 2, "allow": str(tmp_path / "allow.json"), "base": "m",
        "watch": 0, "audit": str(tmp_path / "audit.jsonl"), "prompt_embeds": True, "multimodal": True,
        "capsule_metrics": True,
    }  # fmt: skip
    config = KifConfig.parse(table)
    assert config.mandatory == ("b", "a")
    assert config.sites == (3, 5)
    assert config.watch == 0.0
    assert {name for name in table if getattr(config, name) is None} == set()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"capsuls": "x"}, "capsuls"),
        ({"capsules": "/nowhere/at/all"}, "no directory"),
        ({"capsules": 3}, "path"),
        ({"capsules": "a\0b"}, "path"),
        ({"mandatory": "some"}, "mandatory"),
        ({"mandatory": [1]}, "mandatory"),
        ({"mandatory": {"a": 1}}, "mandatory"),
        ({"sites": []}, "sites"),
        ({"sites": [-1]}, "sites"),
        ({"sites": [True]}, "sites"),
        ({"max_capsules": 0}, "max_capsules"),
        ({"max_capsules": 1.5}, "max_capsules"),
        ({"max_signatures": True}, "max_signatures"),
        ({"watch": -1}, "watch"),
        ({"watch": "1"}, "watch"),
        ({"prompt_embeds": 1}, "prompt_embeds"),
        ({"base": ""}, "base"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_it(tmp_path, change, word):
    with pytest.raises(ConfigError) as caught:
        KifConfig.parse({"capsules": str(tmp_path)} | change)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, [], "x", 3, {}])
def test_what_is_no_table_with_a_directory_is_refused(content):
    with pytest.raises(ConfigError):
        KifConfig.parse(content)


def test_a_server_without_the_entry_has_no_kif():
    class Config:
        additional_config = {"other": 1}

    assert KifConfig.of(Config) is None
    assert KifConfig.of(object()) is None


KEY = "a" * 64


def test_the_allow_list_is_read(tmp_path):
    path = tmp_path / "allow.json"
    path.write_text(json.dumps({KEY: ["france"], "*": []}))
    assert read_allowed(path) == {KEY: frozenset({"france"}), "*": frozenset()}


@pytest.mark.parametrize("content", ["", "[]", '{"key": ["a"]}', f'{{"{KEY}": "a"}}', f'{{"{KEY}": [1]}}'])
def test_a_malformed_allow_list_is_refused(tmp_path, content):
    path = tmp_path / "allow.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="allow-list"):
        read_allowed(path)
