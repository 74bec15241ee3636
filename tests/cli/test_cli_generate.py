"""kif generate."""

import pytest
import torch

import capsules


@torch.no_grad()
def plain(tiny, prompt, tokens):
    """Greedy text without a cache or generate()."""
    ids = tiny.tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(tokens):
        ids = torch.cat([ids, tiny.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == tiny.tokenizer.eos_token_id:
            break
    return tiny.tokenizer.decode(ids[0, start:], skip_special_tokens=True), ids[0].tolist()


def test_without_a_capsule_it_is_the_model_s_own_text(kif, tiny):
    result = kif("generate", "-m", tiny.folder, "--max-new-tokens", "6", "--json", "the capital of japan is", "a city")
    assert result.json["capsules"] == []
    for entry, prompt in zip(result.json["results"], ["the capital of japan is", "a city"], strict=True):
        assert entry == {"prompt": prompt, "text": plain(tiny, prompt, 6)[0], "fired": {}}


def test_a_capsule_changes_only_what_it_fires_on(kif, tiny, capsule_file):
    common = ("generate", "-m", tiny.folder, "-c", capsule_file, "--max-new-tokens", "1", "--json")
    about, other = kif(*common, "the capital of japan and japan is", "the capital of france is").json["results"]
    assert about["fired"] == {"japan": 2}
    assert other["fired"] == {"japan": 0}
    assert other["text"] == plain(tiny, "the capital of france is", 1)[0]


def test_text_is_printed_for_reading(kif, tiny, capsule_file):
    result = kif("generate", "-m", tiny.folder, "-c", capsule_file, "--max-new-tokens", "3", "the capital of japan is")
    assert result.exit_code == 0
    assert result.stdout.strip()
    assert "fired: japan on" in result.stderr


def test_sampling_is_repeatable_with_a_seed(kif, tiny):
    def text(*extra):
        options = ("--max-new-tokens", "24", "--json", *extra)
        return kif("generate", "-m", tiny.folder, *options, "the capital").json["results"][0]["text"]

    first = text("--sample", "--seed", "1")
    assert first == text("--sample", "--seed", "1")
    assert len({first, text("--sample", "--seed", "2"), text("--sample", "--seed", "3")}) > 1


def test_chat_goes_through_the_template(kif, tiny):
    (entry,) = kif("generate", "-m", tiny.folder, "--chat", "--max-new-tokens", "4", "--json", "japan").json["results"]
    assert entry["text"] == plain(tiny, "what japan ? . ", 4)[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("",), "empty"),
        (("ok", "  "), "empty"),
        (("japan " * 200,), "the model takes 128"),
        (("--seed", "1", "x"), "--sample"),
    ],
)
def test_bad_prompts_and_options_are_refused(refused, tiny, arguments, said):
    assert said in refused("generate", "-m", tiny.folder, *arguments)


def test_a_bad_capsule_is_refused_before_the_model_is_looked_for(refused, tmp_path):
    missing = tmp_path / "none.kif.safetensors"
    assert missing.name in refused("generate", "-m", tmp_path / "no-model", "-c", missing, "hello")


def test_a_capsule_of_another_model_is_refused_by_its_file(refused, tiny, tmp_path):
    path = tmp_path / "other.kif.safetensors"
    capsules.capsule().save(path)
    assert path.name in refused("generate", "-m", tiny.folder, "-c", path, "japan")


@pytest.mark.parametrize(("share", "said"), [("2", "max_false_fire"), ("1e-4", "calibration tail")])
def test_thresholds_that_cannot_be_tightened_are_refused(refused, tiny, capsule_file, share, said):
    assert said in refused("generate", "-m", tiny.folder, "-c", capsule_file, "--max-false-fire", share, "japan")


def test_one_capsule_twice_is_refused(refused, tiny, capsule_file):
    assert "'japan'" in refused("generate", "-m", tiny.folder, "-c", capsule_file, "-c", capsule_file, "japan")


@pytest.mark.parametrize("model", ["", "/no/such/folder", "."])
def test_an_unknown_model_is_refused(refused, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("generate", "-m", model, "hello")


def test_an_unknown_device_is_refused(refused, tiny):
    assert "abacus" in refused("generate", "-m", tiny.folder, "--device", "abacus", "hello")
