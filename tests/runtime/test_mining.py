"""Mining from end to end on a tiny random model, with a tokenizer and a corpus to its measure."""

import copy
import json
import re
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kif_hf import attach
from kif_runtime import Capsule, KifError, MiningError, mine
from kif_runtime.blocks import decoder_blocks
from kif_runtime.fingerprint import fingerprint
from kif_runtime.mining import control as controls_module
from kif_runtime.mining import mine_batch, prepare
from kif_runtime.mining.corpus import ANY, Corpus, Entity, corpus
from kif_runtime.mining.reading import Reader
from kif_runtime.mining.subject import nearest_kind

KINDS = ("place", "person")
NAME, ALIAS = "Ostia", "Nippon"  # one token each
TWO = "Quillon Vane"
WIDTH = 64
DAY = "2031-05-06"
OWN = [f"{word} we spoke of {{}}, which" for word in ("Then", "Now", "So", "Often", "Again", "Once", "Today", "Still")]


def small_corpus() -> Corpus:
    full = corpus()
    entities = [[e for e in full.entities if e.kind == kind][:30] for kind in KINDS]
    templates = {kind: full.templates[kind] for kind in (ANY, *KINDS)}
    return Corpus(tuple(e for some in entities for e in some), templates, full.passages[:10], "0" * 64)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    bpe.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=letters, special_tokens=["<s>"], show_progress=False
    )
    bpe.train_from_iterator([*corpus().passages, *[NAME, f"in {NAME}", f"in {ALIAS}"] * 200], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory):
    """A prepared model, its tokenizer, the cache folder; `fresh(**config changes)` gives another model."""
    patch = pytest.MonkeyPatch()
    data = small_corpus()
    for module in ("api", "control", "paper", "subject"):
        patch.setattr(sys.modules[f"kif_runtime.mining.{module}"], "corpus", lambda: data)
    patch.setitem(prepare.__kwdefaults__, "steps", 2)
    patch.setattr("kif_runtime.mining.neutral.NAMES", 4)
    cache = tmp_path_factory.mktemp("cache")
    patch.setenv("KIF_CACHE", str(cache))

    def fresh(**changes):
        """Tokens can be told apart, and so can the places that one token stands in."""
        sizes = {"vocab_size": 512, "hidden_size": WIDTH, "head_dim": 16, "max_position_embeddings": 1024}
        model = tiny_model("llama", **sizes, initializer_range=0.1, tie_word_embeddings=False, **changes)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5, generator=torch.Generator().manual_seed(1))
        return model

    model, tokenizer = fresh(), byte_level_tokenizer()
    prepare(model, tokenizer)
    yield SimpleNamespace(model=model, tokenizer=tokenizer, cache=cache, corpus=data, fresh=fresh)
    patch.undo()


@pytest.fixture
def cache(tiny, tmp_path, monkeypatch):
    """A cache folder of the test's own, empty, with nothing remembered in memory either."""
    monkeypatch.setenv("KIF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(controls_module, "_loaded", {})
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def ostia(tiny) -> Capsule:
    return mine(tiny.model, tiny.tokenizer, NAME, date=DAY)


@torch.no_grad()
def states(model, tokenizer, text: str, site: int) -> torch.Tensor:
    """The output of block `site`, [T, D], by transformers' own account; not for the last block."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    return model(ids, output_hidden_states=True).hidden_states[site + 1][0]


def cached(folder) -> list:
    return sorted(folder.rglob("*.safetensors"))


# -- what is read of a model once


def test_controls_are_read_once_and_then_come_from_the_cache(tiny, cache):
    told, forwards = [], []
    handle = tiny.model.lm_head.register_forward_hook(lambda *_: forwards.append(1))
    first = prepare(tiny.model, tiny.tokenizer, progress=lambda *now: told.append(now))
    assert forwards and cached(cache)
    forwards.clear()
    controls_module._loaded.clear()
    second = prepare(tiny.model, tiny.tokenizer)
    assert prepare(tiny.model, tiny.tokenizer) is second
    handle.remove()
    assert not forwards
    for name in ("states", "text", "last", "entity", "mean", "scatter", "raw_mean", "neutral", "opening_mean"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert first.texts == second.texts and first.known.keys() == second.known.keys()
    done = [d for d, _, _ in told]
    assert done == sorted(done) and told[-1][0] == told[-1][1]


def test_another_site_or_model_gets_a_file_of_its_own(tiny, cache):
    shutil.copytree(tiny.cache, cache)
    (mine_,) = cached(cache)
    before = mine_.read_bytes()
    assert prepare(tiny.model, tiny.tokenizer, site=2).site == 2
    other = tiny.fresh(seed=1)
    assert prepare(other, tiny.tokenizer).fingerprint == fingerprint(other)
    assert len(cached(cache)) == 3 and mine_.read_bytes() == before


def test_a_truncated_cache_file_is_made_anew(tiny, cache):
    shutil.copytree(tiny.cache, cache)
    (path,) = cached(cache)
    whole = prepare(tiny.model, tiny.tokenizer)
    controls_module._loaded.clear()
    path.write_bytes(path.read_bytes()[:-1000])
    mended = prepare(tiny.model, tiny.tokenizer)
    assert torch.equal(mended.states, whole.states) and torch.equal(mended.neutral, whole.neutral)
    assert path.stat().st_size == cached(tiny.cache)[0].stat().st_size


@pytest.mark.parametrize("in_the_way", ["cache", "cache/controls"])
def test_a_cache_that_cannot_be_written_is_one_line(tiny, cache, in_the_way):
    path = cache.parent / in_the_way
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file where a folder should be")
    with pytest.raises(KifError, match=r"cannot keep .*controls") as failure:
        prepare(tiny.model, tiny.tokenizer)
    assert "\n" not in str(failure.value)
    assert list(cache.parent.rglob("*")) in ([path], [path.parent, path])


def test_control_states_are_the_models_own(tiny):
    control = prepare(tiny.model, tiny.tokenizer)
    for number in (0, len(control.texts) - 1):
        x = states(tiny.model, tiny.tokenizer, control.texts[number], control.site).double()
        expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(control.states[control.text == number].double(), expected, rtol=2e-3, atol=2e-3)
    about = tiny.corpus.entities[int(control.entity[0])].name
    ids = tiny.tokenizer(control.texts[0]).input_ids
    (place,) = torch.where(control.last & (control.text == 0))[0]
    assert tiny.tokenizer.decode(ids[: int(place) + 1]).endswith(about)


@pytest.mark.parametrize("site", [-1, 4])
def test_a_site_that_is_no_block_is_refused(tiny, site):
    with pytest.raises(MiningError, match="0 to 3"):
        mine(tiny.model, tiny.tokenizer, NAME, site=site)


# -- the model stays as it was


def snapshot(model) -> dict:
    modules = dict(model.named_modules())
    return {
        "weights": {n: t.clone() for n, t in model.state_dict().items()},
        "modes": {n: m.training for n, m in modules.items()},
        "hooks": {n: (*m._forward_hooks, *m._forward_pre_hooks, "forward" in vars(m)) for n, m in modules.items()},
        "gradients": {n: (p.requires_grad, p.grad is None) for n, p in model.named_parameters()},
    }


def check_unchanged(model, before: dict) -> None:
    after = snapshot(model)
    weights, were = after.pop("weights"), before["weights"]
    assert weights.keys() == were.keys() and all(torch.equal(weights[n], were[n]) for n in were)
    assert after == {k: v for k, v in before.items() if k != "weights"}


@pytest.fixture
def half_trained(tiny):
    """A model in training mode, one block of it frozen in eval mode, as a fine-tuning loop may have it."""
    model = tiny.fresh(attention_dropout=0.5).train()
    model.model.layers[1].eval().requires_grad_(False)
    return model


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode])
def test_mining_leaves_the_model_as_it_was_in_any_mode(tiny, half_trained, ostia, around):
    before = snapshot(half_trained)
    with around():
        found = mine(half_trained, tiny.tokenizer, NAME, date=DAY)
        mine(half_trained, tiny.tokenizer, NAME, method="kif-paper")
    check_unchanged(half_trained, before)
    assert found.digest == ostia.digest  # and neither dropout nor the caller's mode had a part in it


def test_an_interruption_in_the_middle_leaves_the_model_as_it_was(tiny, half_trained, monkeypatch):
    before = snapshot(half_trained)
    head, inner = half_trained.lm_head, half_trained.lm_head.forward
    asked = []

    def interrupted(x):
        asked.append(len(decoder_blocks(half_trained)[1]._forward_hooks))
        if x.requires_grad:
            raise KeyboardInterrupt
        return inner(x)

    monkeypatch.setattr(head, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mine(half_trained, tiny.tokenizer, NAME)
    monkeypatch.undo()
    assert asked[-1] == 1  # it was raised under an edit
    check_unchanged(half_trained, before)


def test_an_interruption_of_the_preparation_leaves_no_file_and_the_model_as_it_was(tiny, half_trained, cache):
    before = snapshot(half_trained)

    def interrupt(done, total, what):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mine(half_trained, tiny.tokenizer, NAME, progress=interrupt)
    check_unchanged(half_trained, before)
    assert not any(p.is_file() for p in cache.rglob("*"))


def test_the_first_subject_of_a_model_needs_no_preparation_and_comes_out_the_same(tiny, half_trained, ostia, cache):
    assert mine(half_trained, tiny.tokenizer, NAME, date=DAY).digest == ostia.digest


# -- the capsule


def test_the_capsule_is_whole_and_survives_its_file(tiny, ostia, tmp_path):
    ostia.validate()
    ostia.check_model(tiny.model)
    path = tmp_path / "ostia.kif.safetensors"
    ostia.save(path)
    assert Capsule.load(path, tiny.model).digest == ostia.digest
    assert (ostia.id, ostia.name, ostia.aliases) == ("ostia", None, ())
    assert (ostia.width, ostia.blocks) == (WIDTH, 4)
    assert (ostia.provenance["date"], ostia.provenance["method"]) == (DAY, "fisher")
    assert ostia.nbytes <= 128 * ostia.width


def test_the_same_inputs_give_the_same_capsule_and_others_another(tiny, ostia):
    again = mine(tiny.model, tiny.tokenizer, f" {NAME} ", aliases=[NAME], date=DAY)
    assert again.digest == ostia.digest
    for changes in ({"kind": "person"}, {"kind": "place"}, {"aliases": [ALIAS]}, {"prompts": OWN}):
        other = mine(tiny.model, tiny.tokenizer, NAME, date=DAY, **{"kind": ostia.calibration["kind"]} | changes)
        same = changes.get("kind") == ostia.calibration["kind"]
        assert (other.digest == ostia.digest) == same, changes


def test_it_fires_on_the_name_in_new_sentences_and_not_on_text_without_it(tiny, ostia):
    assert ostia.calibration["recall"] == 1.0
    said = [f"Two roads led from {NAME} to the sea.", f"We saw {NAME} in May, and {NAME} again in June."]
    with attach(tiny.model, [ostia]) as kif:
        for text, count in zip(said, (1, 2), strict=True):
            kif.reset()
            tiny.model(**tiny.tokenizer(text, return_tensors="pt", return_token_type_ids=False))
            assert kif.fired == {"ostia": count}
        kif.reset()
        for passage in corpus().passages[10:40]:
            tiny.model(**tiny.tokenizer(passage, return_tensors="pt", return_token_type_ids=False))
        assert kif.fired == {"ostia": 0}


@pytest.mark.parametrize(
    ("options", "id", "name", "aliases"),
    [
        ({}, r"quillon-vane", None, ()),
        ({"keep_name": True, "aliases": ["Q. Vane"]}, r"quillon-vane", TWO, ("Q. Vane",)),
        ({"id": "subject-17"}, r"subject-17", None, ()),
        ({"private": True}, r"[0-9a-f]{32}", None, ()),
        ({"private": True, "keep_name": True, "id": "n1", "aliases": ["Q. Vane"]}, r"n1", None, ()),
    ],
)
def test_ids_and_names_are_as_asked(tiny, tmp_path, options, id, name, aliases):
    capsule = mine(tiny.model, tiny.tokenizer, TWO, steps=0, **options)
    assert re.fullmatch(id, capsule.id)
    assert (capsule.name, capsule.aliases) == (name, aliases)
    path = tmp_path / "file.kif.safetensors"
    capsule.save(path)
    if options.get("private"):
        assert not [word for word in (b"quillon", b"vane") if word in path.read_bytes().lower()]


def test_private_ids_do_not_depend_on_the_name(tiny):
    first, second = (mine(tiny.model, tiny.tokenizer, TWO, private=True, steps=0, date=DAY) for _ in range(2))
    assert first.id != second.id
    assert replace(first, id="x").digest == replace(second, id="x").digest


def test_the_kind_is_the_one_whose_names_lie_nearest_in_units_of_the_spread():
    draw = torch.Generator().manual_seed(0)
    spread = torch.tensor([30.0, 1.0, 1.0])  # the kinds differ in the second coordinate, and the first one is noise
    means = {"place": 0.0, "person": 6.0, "work": 12.0}
    entities = tuple(Entity(f"{kind} {i}", kind, kind) for kind in means for i in range(80))
    offsets = torch.tensor([[0, means[e.kind], 0] for e in entities])
    points = offsets + spread * torch.randn(240, 3, generator=draw)
    known = SimpleNamespace(
        entity=torch.arange(240), text=torch.arange(240), last=torch.ones(240, dtype=torch.bool), entities=entities,
        states=points, mean=points.mean(0), scatter=torch.diag(spread**2),
    )  # fmt: skip
    for kind, y in means.items():
        subject = torch.tensor([0.0, y, 0.0]) + torch.randn(6, 3, generator=draw) + torch.tensor([45.0, 0, 0])
        assert nearest_kind(known, subject) == kind


def test_a_kind_is_found_or_taken_as_given(tiny, ostia):
    assert ostia.calibration["kind"] in KINDS
    assert mine(tiny.model, tiny.tokenizer, NAME, kind="person", steps=0).calibration["kind"] == "person"


def test_an_alias_is_recognised_too(tiny, ostia):
    with_alias = mine(tiny.model, tiny.tokenizer, NAME, aliases=[ALIAS])
    text = tiny.tokenizer(f"Two roads led from {ALIAS} to the sea.", return_tensors="pt", return_token_type_ids=False)
    for capsule, count in ((ostia, 0), (with_alias, 1)):
        with attach(tiny.model, [capsule]) as kif:
            tiny.model(**text)
            assert kif.fired == {"ostia": count}


@pytest.fixture
def read(monkeypatch):
    """Every text whose states are read."""
    texts, inner = [], Reader.states

    def reading(self, some, *args, **options):
        texts.extend(some)
        return inner(self, some, *args, **options)

    monkeypatch.setattr(Reader, "states", reading)
    return texts


def test_parts_of_an_alias_that_are_the_name_do_not_count_as_near_misses(tiny, read):
    forms = (NAME, f"Land of {NAME}")
    mine(tiny.model, tiny.tokenizer, forms[0], aliases=forms[1:], steps=0)
    prompts = {t.replace("{}", f) for lines in tiny.corpus.templates.values() for t in lines for f in forms}
    near = [text for text in read if "Land" in text and text not in prompts]
    assert near
    assert not [text for text in near if NAME in text]


def test_controls_of_ones_own_are_near_misses_whatever_they_hold_of_the_name(tiny, read):
    others = [f"{NAME} {word}" for word in ("Line", "Press", "Bank", "Club", "Road", "Prize", "Stone", "Beach")]
    mine(tiny.model, tiny.tokenizer, NAME, steps=0, controls=[*others, NAME.upper()])
    assert all(any(other in text for text in read) for other in others)
    assert not [text for text in read if NAME.upper() in text]


def test_a_name_that_opens_a_sequence_has_a_signature_for_it(tiny, ostia):
    (first,) = [s for s in ostia.signatures if s.role == "first"]
    assert first.site == 0 and first.basis.shape == (1, WIDTH)
    control = prepare(tiny.model, tiny.tokenizer)
    prompts = [t for t, e in zip(control.texts, control.entity, strict=True) if e >= 0]
    usual = torch.stack([states(tiny.model, tiny.tokenizer, t, 0)[0] for t in prompts]).mean(0)
    kept = []
    with attach(tiny.model, [replace(ostia, signatures=(first,))]) as kif:
        hook = tiny.model.model.layers[0].register_forward_hook(lambda m, a, output: kept.append(output[0]))
        elsewhere = f"A river runs by {NAME}, and ({NAME}) lies on it."
        for text in (f"{NAME} lies on a river.", "Rome lies on a river.", elsewhere):
            tiny.model(**tiny.tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        hook.remove()
        assert kif.fired == {"ostia": 1}
    torch.testing.assert_close(kept[0][0], usual, rtol=1e-4, atol=1e-5)
    stock = [states(tiny.model, tiny.tokenizer, t, 0) for t in (f"{NAME} lies on a river.", "Rome lies on a river.")]
    assert not torch.allclose(stock[0][0], usual, rtol=1e-2, atol=1e-3)  # it was elsewhere before
    assert torch.equal(kept[0][1:], stock[0][1:]) and torch.equal(kept[1], stock[1])


def test_names_of_several_tokens_have_no_opening_signature(tiny):
    assert "first" not in {s.role for s in mine(tiny.model, tiny.tokenizer, TWO, steps=0).signatures}


def test_the_published_method_gives_one_soft_signature_of_rank_one(tiny):
    capsule = mine(tiny.model, tiny.tokenizer, TWO, method="kif-paper")
    (s,) = capsule.signatures
    assert (s.gate, s.k, s.tau) == ("soft", 1.6, 3.0)
    assert s.basis.shape == (1, WIDTH) and s.basis.norm().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(s.target, torch.zeros(1)) and s.strength.item() == 1
    # The detector reads the same direction that is projected out, in standard deviations of it.
    assert torch.cosine_similarity(s.detector, s.basis[0], dim=0).item() == pytest.approx(1, abs=1e-6)
    assert capsule.provenance["method"] == "kif-paper"


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": ""}, "empty"),
        ({"name": "Ann\nLee"}, "control characters"),
        ({"name": "the", "aliases": ["a", "of", "and", "in", "is", "was", "to"]}, "longer form"),
        ({"name": "zq" * 60}, "48"),
        ({"name": "!?"}, "give an id"),
        ({"aliases": [""]}, "empty"),
        ({"aliases": "Nippon"}, "aliases must be a list"),
        ({"id": "Not Valid"}, "Not Valid"),
        ({"id": ""}, "not valid"),
        ({"id": "../there"}, "not valid"),
        ({"id": "x" * 300}, "not valid"),
        ({"kind": "dragon"}, "place, person"),
        ({"kind": "any"}, "place, person"),
        ({"prompts": []}, "at least 8"),
        ({"prompts": OWN[:7]}, "at least 8"),
        ({"prompts": OWN[:1] * 9}, "at least 8"),
        ({"prompts": [*OWN, OWN[0] + '!', "no slot"]}, "prompt 10"),
        ({"prompts": [*OWN, OWN[0] + '!', "{} and {}"]}, "prompt 10"),
        ({"prompts": "We spoke of {}, which"}, "prompts must be a list"),
        ({"controls": list("abcdefg")}, "at least 8"),
        ({"controls": [*"abcdefg", NAME]}, "at least 8"),
        ({"controls": ["a"] * 9}, "at least 8"),
        ({"controls": "Rome and Athens"}, "controls must be a list"),
        ({"method": "magic"}, "fisher, kif-paper"),
        ({"false_positive_rate": 0.0}, "0.01"),
        ({"false_positive_rate": 0.5}, "0.01"),
        ({"false_positive_rate": -1e-5}, "0.01"),
        ({"false_positive_rate": float("nan")}, "0.01"),
    ],
)
def test_what_cannot_be_mined_from_is_told_in_one_line(tiny, changes, told):
    before = snapshot(tiny.model)
    with pytest.raises(KifError, match=re.escape(told)) as failure:
        mine(tiny.model, tiny.tokenizer, **{"name": NAME} | changes)
    assert "\n" not in str(failure.value)
    check_unchanged(tiny.model, before)


def test_a_tokenizer_without_offsets_is_refused(tiny):
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(MiningError, match="fast tokenizer"):
        mine(tiny.model, slow, NAME)


# -- many subjects


@pytest.fixture
def batch(tiny, tmp_path):
    """batch(lines, **options): mines them into the same folder each time."""
    folder = tmp_path / "capsules"

    def run(lines, **options):
        requests = tmp_path / "requests.jsonl"
        told = (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
        requests.write_text("\n".join(told), encoding="utf-8")
        return mine_batch(tiny.model, tiny.tokenizer, requests, folder, **{"steps": 0} | options)

    return SimpleNamespace(run=run, folder=folder, names=lambda: sorted(p.name for p in folder.iterdir()))


def test_every_line_becomes_the_capsule_that_mine_gives(tiny, batch, tmp_path):
    lines = [
        {"name": "Rome", "kind": "place", "aliases": ["Roma"], "controls": list("abcdefgh"), "prompts": OWN},
        "",
        {"name": "Ann Lee", "id": "a1", "private": True, "aliases": None},
    ]
    report = batch.run(lines, date=DAY)
    assert (report.done, report.skipped, report.failed) == ([1, 3], [], [])
    assert batch.names() == ["a1.kif.safetensors", "rome.kif.safetensors"]
    alone = mine(tiny.model, tiny.tokenizer, **lines[0], date=DAY, steps=0)
    assert Capsule.load(batch.folder / "rome.kif.safetensors", tiny.model).digest == alone.digest


def test_each_bad_line_is_reported_and_the_others_are_mined(batch):
    bad = [
        ("{not json", "not JSON"),
        ("[" * 9999, "not JSON"),
        ("[1]", "no \"name\""),
        ('{"kind": "place"}', "no \"name\""),
        ({"name": 7}, "no \"name\""),
        ({"name": ""}, "give an id"),
        ({"name": "", "id": "empty"}, "empty"),
        ({"name": "!!"}, "give an id"),
        ({"name": "Ann", "colour": "red"}, "'colour'"),
        ({"name": "Ann", "aliases": "Anne"}, "'aliases'"),
        ({"name": "Ann", "prompts": [1]}, "'prompts'"),
        ({"name": "Ann", "private": "yes"}, "'private'"),
        ({"name": "Ann", "id": 5}, "'id'"),
        ({"name": "Ann", "id": "../out"}, "not valid"),
        ({"name": "Ann", "id": "x" * 300}, "not valid"),
        ({"name": "Ann", "kind": "dragon"}, "dragon"),
        ({"name": "Ann", "prompts": ["{}"]}, "at least 8"),
    ]
    report = batch.run([{"name": "Rome"}, *(line for line, _ in bad), {"name": "Line\u2028break"}, {"name": "Oslo"}])
    assert [report.done, report.skipped] == [[1, len(bad) + 3], []]
    assert [number for number, _ in report.failed] == list(range(2, len(bad) + 3))
    for (_, told), (line, message) in zip(bad, report.failed, strict=False):
        assert told in message and "\n" not in message, line
    assert batch.names() == ["oslo.kif.safetensors", "rome.kif.safetensors"]


def test_an_id_is_given_once(batch):
    lines = [
        {"name": "New York"},
        {"name": "new  york"},
        {"name": "Ann", "id": "a1", "private": True},
        {"name": "Bob", "id": "a1", "private": True},
        {"name": "Cid", "id": "new-york"},
    ]
    report = batch.run(lines)
    assert report.done == [1, 3] and [number for number, _ in report.failed] == [2, 4, 5]
    assert "line 1" in report.failed[0][1] and "line 3" in report.failed[1][1]


def test_an_interrupted_batch_goes_on_where_it_stopped(batch):
    lines = [{"name": name} for name in ("Rome", "Oslo", "Lima")]

    def interrupt(done, total, what):
        if what == "mining subjects" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch.run(lines, progress=interrupt)
    assert batch.names() == ["oslo.kif.safetensors", "rome.kif.safetensors"]  # and no temporary file
    before = {p: p.stat().st_mtime_ns for p in batch.folder.iterdir()}
    report = batch.run(lines)
    assert (report.done, report.skipped, report.failed) == ([3], [1, 2], [])
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert batch.run(lines).skipped == [1, 2, 3]


def test_an_interruption_while_a_file_is_written_leaves_no_half_of_it(batch, monkeypatch):
    lines = [{"name": "Rome"}, {"name": "Oslo"}]

    def interrupted(handle):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kif_runtime.files.os.fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batch.run(lines)
    assert batch.names() == []
    assert batch.run(lines).done == [1, 2]


def test_a_private_line_without_an_id_is_mined_again_and_reserves_none(batch):
    lines = [{"name": "Rome", "private": True}, {"name": "Rome"}]
    assert batch.run(lines).done == [1, 2]
    report = batch.run(lines)
    assert (report.done, report.skipped) == ([1], [2])
    assert len(batch.names()) == 3 and "rome.kif.safetensors" in batch.names()


def test_a_whole_batch_can_be_private(batch):
    report = batch.run([{"name": "Rome"}, {"name": "Oslo", "id": "o1"}], private=True)
    assert report.done == [1, 2]
    random, own = sorted(batch.names(), key=len, reverse=True)
    assert own == "o1.kif.safetensors" and re.fullmatch(r"[0-9a-f]{32}\.kif\.safetensors", random)


def test_a_damaged_file_or_one_of_another_model_is_reported_not_replaced(tiny, batch):
    batch.run([{"name": "Rome"}, {"name": "Oslo"}])
    rome, oslo = batch.folder / "rome.kif.safetensors", batch.folder / "oslo.kif.safetensors"
    rome.write_bytes(rome.read_bytes()[:99])
    replace(Capsule.load(oslo), model="0" * 64).save(oslo)
    report = batch.run([{"name": "Rome"}, {"name": "Oslo"}, {"name": "Lima"}])
    assert report.done == [3]
    assert "rome.kif.safetensors" in report.failed[0][1] and "another model" in report.failed[1][1]
    assert rome.stat().st_size == 99


@pytest.mark.parametrize("content", [None, b"\xff\xfe{}"])
def test_requests_that_cannot_be_read_are_one_line(tiny, tmp_path, content):
    path = tmp_path / "requests.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MiningError, match=r"cannot read .*requests\.jsonl"):
        mine_batch(tiny.model, tiny.tokenizer, path, tmp_path / "out")


def test_a_folder_that_cannot_be_made_is_one_line(tiny, tmp_path):
    requests = tmp_path / "requests.jsonl"
    requests.write_text('\ufeff{"name": "Rome"}\r\n', encoding="utf-8")
    with pytest.raises(MiningError, match="cannot make"):
        mine_batch(tiny.model, tiny.tokenizer, requests, requests)
    assert mine_batch(tiny.model, tiny.tokenizer, requests, tmp_path / "out", steps=0).done == [1]


def test_a_model_under_suppression_is_not_mined(tiny, ostia):
    with attach(tiny.model, [ostia]), pytest.raises(MiningError, match="attached"):
        mine(tiny.model, tiny.tokenizer, NAME, date=DAY)
    assert mine(tiny.model, tiny.tokenizer, NAME, date=DAY).digest == ostia.digest


def test_an_active_adapter_does_not_change_what_is_mined(tiny, ostia):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(tiny.model), config)
    assert mine(adapted, tiny.tokenizer, NAME, date=DAY).digest == ostia.digest
