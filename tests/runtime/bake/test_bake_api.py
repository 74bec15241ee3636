"""bake(): what it writes, what it refuses, and that the model stays as it was."""

import errno
import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kif_runtime.bake import bake
from kif_runtime.bake.adapter import layers
from kif_runtime.bake.continuing import Earlier, added, compact, joined
from kif_runtime.bake.retiring import left
from kif_runtime.errors import BakingError, CapsuleError, KifError
from tests.mining import check_unchanged, snapshot
from tests.runtime.bake.conftest import BLOCKS, NAME, OTHER, SITE

QUICK = {"rank": 4, "alpha": 8.0, "steps": 2, "forget_rows": 2, "retain_rows": 2}
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def baked(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("baked") / "adapter"
    before = snapshot(tiny.model)
    result = bake(tiny.model, tiny.tokenizer, [tiny.capsule], out, names={"zembla": [NAME]}, settings=QUICK)
    check_unchanged(tiny.model, before)
    return result


@torch.no_grad()
def answers(model, tokenizer, text):
    return model(**tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1)


def test_plain_peft_loads_it_and_forgets_as_measured(tiny, baked):
    text = f"the city of {NAME} is"
    bare = answers(tiny.model, tiny.tokenizer, text)
    plain = PeftModel.from_pretrained(tiny.model, baked.folder)
    try:
        assert float((answers(plain, tiny.tokenizer, text) - bare).abs().sum()) > 0.01
        measured = left(plain.eval(), tiny.tokenizer, tiny.capsule, [NAME])
    finally:
        plain.unload()
    assert measured == pytest.approx(baked.ratios, rel=1e-3)


def test_it_is_told_whether_signatures_became_neurons(tiny, baked, tmp_path, monkeypatch):
    monkeypatch.setattr("kif_runtime.bake.objectives.capsule._HELPFUL", 0.0)  # so that no start would help
    alone = bake(tiny.model, tiny.tokenizer, [tiny.capsule], tmp_path, names={"zembla": [NAME]}, settings=QUICK)
    for made, neurons in ((baked, 1), (alone, 0)):
        assert made.provenance["neurons"] == neurons
        assert ("all of it was trained" in (made.folder / "README.md").read_text()) == (not neurons)


def test_what_cannot_start_from_neurons_is_trained_in_larger_steps(tiny, baked, tmp_path):
    """The small ones are for neurons that work already."""
    out, settings = tmp_path / "out", QUICK | {"targets": ("attention",)}
    alone = bake(tiny.model, tiny.tokenizer, [tiny.capsule], out, names={"zembla": [NAME]}, settings=settings)
    rates = [made.provenance["settings"]["learning_rate"] for made in (baked, alone)]
    assert rates == [3e-5, 2e-3] and alone.provenance["neurons"] == 0


def test_provenance_says_what_it_is_from_and_nothing_names_the_subject(tiny, baked):
    told = json.loads((baked.folder / "kif.json").read_text())
    assert told["capsules"] == [tiny.capsule.digest] and told["model"] == tiny.capsule.model
    assert (told["objective"], told["seed"], told["rank"]) == ("capsule", 0, 4)
    assert told["ratios"] == baked.ratios
    names = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "kif.json",
        "README.md",
        "training.jsonl",
        "curves.svg",
    }
    assert {p.name for p in baked.folder.iterdir()} == names
    for path in baked.folder.iterdir():
        assert NAME.lower().encode() not in path.read_bytes().lower()
        assert path.stat().st_mode & 0o777 == 0o600


def test_the_same_seed_gives_the_same_bytes(tiny, baked, tmp_path):
    again = bake(tiny.model, tiny.tokenizer, [tiny.capsule], tmp_path / "x", names={"zembla": [NAME]}, settings=QUICK)
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (again.folder / name).read_bytes() == (baked.folder / name).read_bytes()


@pytest.mark.slow
def test_training_stops_where_it_is_good_enough_but_goes_on_under_attack(tiny, tmp_path):
    easy = QUICK | {"enough": 1e9}
    told = {}
    for name, durability in (("peace", ()), ("attack", ("latent",))):
        made = bake(
            tiny.model, tiny.tokenizer, [tiny.capsule], tmp_path / name, names={"zembla": [NAME]}, settings=easy,
            durability=durability,
        )  # fmt: skip
        told[name] = (made.provenance["steps"], made.provenance["stopped"])
        assert (made.folder / "curves.svg").exists() == (name == "attack")
    assert told == {"peace": (0, "validation"), "attack": (2, "steps")}


def test_merged_weights_answer_as_the_adapter_does(tiny, tmp_path):
    out = tmp_path / "x"
    result = bake(tiny.model, tiny.tokenizer, [tiny.capsule], out, names={"zembla": [NAME]}, settings=QUICK, merge=True)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    with_adapter = PeftModel.from_pretrained(tiny.model, result.folder)
    try:
        with torch.no_grad():
            assert torch.allclose(merged(IDS).logits, with_adapter(IDS).logits, atol=1e-4)
    finally:
        with_adapter.unload()


@pytest.mark.slow
def test_later_subjects_do_not_undo_earlier_ones(tiny, baked, tmp_path):
    later = bake(
        tiny.model, tiny.tokenizer, [tiny.capsules[OTHER]], tmp_path / "both", names={"quorn": [OTHER]},
        settings=QUICK, continue_from=baked.folder,
    )  # fmt: skip
    assert later.provenance["earlier"] == [tiny.capsule.digest]
    assert later.provenance["rank"] == 4  # not the 8 of both side by side
    prompts = [f"the city of {name} is" for name in (NAME, OTHER)]
    bare = [answers(tiny.model, tiny.tokenizer, p) for p in prompts]
    found = []
    for folder in (baked.folder, later.folder):
        model = PeftModel.from_pretrained(tiny.model, folder)
        found.append([answers(model, tiny.tokenizer, p) for p in prompts])
        model.unload()
    assert torch.allclose(found[1][0], found[0][0], atol=2e-3)  # the first is still gone
    assert float((found[1][1] - bare[1]).abs().sum()) > 3 * float((found[0][1] - bare[1]).abs().sum())


def test_the_sum_of_two_adapters_is_their_sum():
    rng = torch.Generator().manual_seed(0)

    def factors(rank, *modules):
        return {m: (torch.randn(rank, 6, generator=rng), torch.randn(5, rank, generator=rng)) for m in modules}

    first, second = factors(2, "a", "b"), factors(3, "b", "c")
    both = joined(first, second)
    for module, (a, b) in both.items():
        assert a.shape == (5, 6) and b.shape == (5, 5)
        wanted = sum((f[module][1] @ f[module][0] for f in (first, second) if module in f), torch.zeros(5, 6))
        assert torch.allclose(b @ a, wanted, atol=1e-5)


def test_ranks_that_add_nothing_are_left_out():
    g = torch.Generator().manual_seed(0)
    factors = {name: (torch.randn(6, 5, generator=g), torch.randn(7, 6, generator=g)) for name in ("x", "y", "z")}
    factors["x"][0][[0, 3]] = 0
    factors["x"][1][:, 5] = 0
    factors["y"][1][:, 1:] = 0
    factors["z"][1][:] = 0
    made = compact(factors)
    assert {name: a.shape[0] for name, (a, _) in made.items()} == {"x": 3, "y": 3, "z": 3}
    for name, (a, b) in factors.items():
        assert torch.allclose(made[name][1] @ made[name][0], b @ a, atol=1e-6)
    assert compact({"z": factors["z"]})["z"][0].shape == (1, 5)  # no LoRA has rank 0


def test_an_earlier_adapter_is_taken_back_bit_for_bit(tiny, baked):
    before = snapshot(tiny.model)
    with added(tiny.model, Earlier(baked.folder).factors):
        assert not torch.equal(tiny.model.state_dict()["model.layers.1.mlp.gate_proj.weight"],
                               before["weights"]["model.layers.1.mlp.gate_proj.weight"])  # fmt: skip
    check_unchanged(tiny.model, before)


def test_a_square_weight_that_keeps_inputs_first_is_changed_as_peft_does(tiny_model):
    """GPT-2's attention output: its shape does not tell which way round it is."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model("gpt2").eval()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True))
    factors, g = {}, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, layer in layers(wrapped).items():
            for part in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                part.copy_(torch.randn(part.shape, generator=g) / 5)
            a, b = layer.lora_A["default"].weight * layer.scaling["default"], layer.lora_B["default"].weight
            factors[path.removeprefix("base_model.model.")] = (a.detach().clone(), b.detach().clone())
        wanted = wrapped(IDS).logits
        plain = wrapped.unload()
        with added(plain, factors):
            assert torch.allclose(plain(IDS).logits, wanted, atol=1e-5)
        assert not torch.allclose(plain(IDS).logits, wanted, atol=1e-2)


def test_an_earlier_adapter_with_scales_of_its_own_is_refused(baked, tmp_path):
    for option, value in (("alpha_pattern", {"up_proj": 3}), ("lora_bias", True)):
        folder = tmp_path / option
        shutil.copytree(baked.folder, folder)
        config = json.loads((folder / "adapter_config.json").read_text()) | {option: value}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(BakingError, match="is no plain LoRA"):
            Earlier(folder)


def test_an_earlier_adapter_is_told_apart_by_its_weights(tiny, baked, tmp_path):
    """Baked anew in the same folder it is another, and a checkpoint on top of the first is not gone on from."""
    shutil.copytree(baked.folder, tmp_path / "earlier")
    first = Earlier(tmp_path / "earlier").digest
    assert first == Earlier(baked.folder).digest
    weights = load_file(baked.folder / "adapter_model.safetensors")
    save_file({name: t * 2 for name, t in weights.items()}, tmp_path / "earlier" / "adapter_model.safetensors")
    assert Earlier(tmp_path / "earlier").digest != first


def attempt(tiny, out, **changes):
    options = {"names": {"zembla": [NAME]}, "settings": QUICK} | changes
    if options.get("capsules") == "twice":  # more signatures than there are blocks from their site on
        options["capsules"] = [replace(tiny.capsule, signatures=tiny.capsule.signatures * (BLOCKS - SITE + 1))]
    return bake(tiny.model, tiny.tokenizer, options.pop("capsules", [tiny.capsule]), out, **options)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"capsules": []}, "nothing to forget; give a capsule"),
        ({"names": {"zembla": [NAME], "x": ["X"]}}, "none of the capsules"),
        ({"names": {"zembla": [" "]}}, "name, or an alias, is empty"),
        ({"settings": QUICK | {"rank": 97}}, "rank 97 does not fit .*ask for 1 to 96"),
        ({"capsules": "twice", "settings": QUICK | {"rank": 1, "blocks": 2}}, "rank 1 is too low for the 2 signatures"),
        ({"settings": QUICK | {"targets": ("nowhere",)}}, "no projection .*it has down_proj"),
        ({"settings": {"speed": 9}}, "no setting 'speed'"),
        ({"settings": QUICK | {"learning_rate": -1.0}}, "learning rate have to be over 0"),
        ({"objective": "hope"}, "unknown objective 'hope'; choose one of capsule"),
        ({"options": {"hope": 1}}, "has no option 'hope'"),
        ({"durability": ["hope"]}, "no durability term 'hope'"),
        ({"continue_from": "/nowhere"}, "holds no LoRA adapter"),
    ],
)
def test_what_cannot_be_baked_is_refused(tiny, tmp_path, changes, told):
    before = snapshot(tiny.model)
    with pytest.raises(KifError, match=told):
        attempt(tiny, tmp_path / "out", **changes)
    check_unchanged(tiny.model, before)


def test_a_private_capsule_without_a_name_is_refused(tiny, tmp_path):
    private = replace(tiny.capsule, id="0" * 32)
    with pytest.raises(BakingError, match=r"holds no name, .*--name, or mine with --with-name"):
        attempt(tiny, tmp_path / "out", capsules=[private], names={})


def test_a_capsule_of_another_model_is_refused(tiny, tmp_path):
    other = replace(tiny.capsule, model="0" * 64)
    with pytest.raises(CapsuleError, match=r"another model|not made for"):
        attempt(tiny, tmp_path / "out", capsules=[other])


def test_a_folder_with_anything_else_in_it_is_refused(tiny, tmp_path, baked):
    with pytest.raises(BakingError, match=r"is not empty .*choose another folder"):
        attempt(tiny, baked.folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BakingError, match="cannot use the folder"):
        attempt(tiny, tmp_path / "file")


def test_a_baking_that_was_killed_while_it_wrote_is_done_again(tiny, baked, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("training.jsonl", "adapter_model.safetensors"):
        (out / name).write_bytes((baked.folder / name).read_bytes()[:-9])
    (out / ".kif-x.tmp").write_bytes(b"half")
    (out / "merged").mkdir()
    (out / "merged" / "config.json").write_text("{}")
    attempt(tiny, out)
    logs = [[json.loads(row) for row in (f / "training.jsonl").read_text().splitlines()] for f in (out, baked.folder)]
    assert len(logs[0]) == len(logs[1]) and logs[0][0] == logs[1][0]  # the first run's rows are gone
    assert {p.name for p in out.iterdir()} == {p.name for p in baked.folder.iterdir()}
    assert (out / "adapter_model.safetensors").read_bytes() == (baked.folder / "adapter_model.safetensors").read_bytes()


def test_missing_libraries_are_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BakingError, match="needs peft and accelerate; install with: pip"):
        attempt(tiny, tmp_path / "out")


def test_a_full_disk_is_one_line_and_no_adapter(tiny, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("kif_runtime.files.os.fsync", full)
    with pytest.raises(BakingError, match="the disk is full") as caught:
        attempt(tiny, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not [p for p in (tmp_path / "out").iterdir() if re.match(r"adapter|kif|\.kif", p.name)]


def test_own_completions_come_for_objectives_that_ask(tiny, data):
    from kif_runtime.bake.adapter import adapted
    from kif_runtime.bake.completions import completed
    from kif_runtime.bake.passes import Passes
    from kif_runtime.bake.settings import Settings

    with adapted(tiny.model, Settings(rank=2), seed=0) as wrapped:
        passes = Passes(wrapped, [tiny.capsule])
        made = completed(passes, tiny.tokenizer, data.forget[:3], "teacher", seed=0)
    for example, prompt in zip(made, data.forget, strict=False):
        ids = torch.tensor([prompt.ids])
        own = tiny.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
                                  pad_token_id=2)[0].tolist()  # fmt: skip
        own = own[: own.index(2, len(prompt.ids)) + 1] if 2 in own[len(prompt.ids) :] else own
        assert (list(example.ids), example.start) == (own, len(prompt.ids))
        assert example.alternative[: len(prompt.ids)] == prompt.ids
    assert any(e.alternative != e.ids for e in made)
