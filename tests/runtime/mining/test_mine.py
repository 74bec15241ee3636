"""Mining from end to end: what comes out for which name, and what is refused."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kif_hf import attach
from kif_runtime import Capsule, KifError, MiningError, mine
from kif_runtime.mining import prepare
from kif_runtime.mining.control import usual_sites
from kif_runtime.mining.corpus import corpus
from kif_runtime.mining.reading import Reader
from kif_runtime.mining.repeated import repeated
from kif_runtime.mining.subject import checked_forms, in_other_cases
from tests.mining import ALIAS, DAY, KINDS, NAME, OWN, TWO, WIDTH, check_unchanged, snapshot, states


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
    changes = ({"kind": "person"}, {"kind": "place"}, {"aliases": [ALIAS]}, {"prompts": OWN})
    others = [mine(tiny.model, tiny.tokenizer, NAME, date=DAY, **some).digest for some in changes]
    assert len(set(others)) == len(others) and ostia.digest not in others[2:]


def test_it_fires_on_the_name_in_new_sentences_and_not_on_text_without_it(tiny, ostia):
    assert ostia.calibration["recall"] == 1.0
    said = [
        f"Two roads led from {NAME} to the sea.", f"They reached {NAME} by ship, and left {NAME} on foot.",
        f"Nothing in {NAME} was built of stone.", f"The mayor of {NAME} resigned.", f"He wrote to {NAME} twice.",
        f"A map of {NAME} hung on the wall, and another map of {NAME} lay below.", f"Who lives in {NAME} now?",
        f"Rain fell on {NAME} all week.", f"It was in {NAME} that they met.", f"Nobody left {NAME} that winter.",
    ]  # fmt: skip
    with attach(tiny.model, [ostia]) as kif:
        for text in said:
            tiny.model(**tiny.tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        assert 11 <= kif.fired["ostia"] <= 12  # of twelve mentions, in random weights
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
    told = "forms" in capsule.provenance["settings"]
    assert told == (id == "quillon-vane")  # where the id does not tell the name, nothing that it can be guessed from
    if options.get("private"):
        assert not [word for word in (b"quillon", b"vane") if word in path.read_bytes().lower()]


def test_private_ids_do_not_depend_on_the_name(tiny):
    first, second = (mine(tiny.model, tiny.tokenizer, TWO, private=True, steps=0, date=DAY) for _ in range(2))
    assert first.id != second.id
    assert replace(first, id="x").digest == replace(second, id="x").digest


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


def test_other_cases_are_mined_where_asked_and_not_stored(tiny, ostia):
    every = mine(tiny.model, tiny.tokenizer, NAME, any_case=True, keep_name=True, date=DAY)
    assert (every.name, every.aliases) == (NAME, ())
    by_hand = mine(tiny.model, tiny.tokenizer, NAME, aliases=[NAME.lower(), NAME.upper()], date=DAY)
    assert len(every.signatures) == len(by_hand.signatures) > len(ostia.signatures)
    assert every.provenance["settings"]["any_case"] and "any_case" not in ostia.provenance["settings"]


@pytest.mark.slow
def test_in_any_case_the_real_model_is_stopped(embedded):
    model, tokenizer = embedded
    for any_case, counts in ((False, (1, 0)), (True, (1, 1))):
        capsule = mine(model, tokenizer, "Ireland", any_case=any_case, steps=0)
        fired = []
        for form in ("Ireland", "IRELAND"):
            with attach(model, [capsule]) as kif:
                model(**tokenizer(f"Last year they moved to {form} again.", return_tensors="pt"))
                fired.append(min(1, kif.fired["ireland"]))
        assert tuple(fired) == counts


@pytest.mark.slow
def test_capitals_of_more_tokens_than_a_name_may_have_are_left_out(embedded):
    reader = Reader(*embedded)
    long = "Saint Bartholomew of the Northern Territories and Dependencies of Gloucestershire"
    assert in_other_cases(reader, [long]) == (long.lower(), long.upper())
    assert in_other_cases(reader, [long + " and Worcestershire" * 4]) == (long.lower() + " and worcestershire" * 4,)
    assert in_other_cases(reader, ["1984", "nato", "NATO"]) == ()


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
    templates = [*repeated(tiny.tokenizer), *(t for lines in tiny.corpus.templates.values() for t in lines)]
    prompts = {t.replace("{}", f) for t in templates for f in forms}
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
    prompts = [t for t, e in zip(control.texts, control.entity, strict=True) if e >= 0][::2]
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


@pytest.fixture
def lenient(monkeypatch):
    """In a model of random weights no token tells anything: take each that is recognised."""
    for bound in ("_FIRES_ELSEWHERE", "_FIRES_NEAR"):
        monkeypatch.setattr(f"kif_runtime.mining.early.{bound}", 1.0)
    return {"steps": 0, "false_positive_rate": 0.01}


def test_names_of_several_tokens_have_early_signatures_and_no_opening_one(tiny, lenient):
    capsule = mine(tiny.model, tiny.tokenizer, TWO, **lenient)
    roles = [s.role for s in capsule.signatures]
    assert "first" not in roles and roles.count("early") >= 2 and roles.count("last") == 1
    control = prepare(tiny.model, tiny.tokenizer)
    assert {s.site for s in capsule.signatures if s.role == "early"} == {control.early.site} == {control.site // 2}
    assert capsule.nbytes <= 128 * capsule.width


def test_signatures_lie_at_the_usual_sites_which_is_where_servers_have_room(tiny, ostia, lenient):
    blocks = len(tiny.model.model.layers)
    two = mine(tiny.model, tiny.tokenizer, TWO, **lenient)
    assert {s.site for c in (ostia, two) for s in c.signatures} == set(usual_sites(blocks))


@pytest.mark.parametrize(("name", "alone"), [(TWO, "Quillon"), ("Quillonvane", "Q")], ids=["two words", "one word"])
def test_early_signatures_leave_the_first_word_and_all_around_the_name_alone(tiny, lenient, name, alone):
    """Other names begin with the same word, and up to its end the model has read nothing else."""
    capsule = mine(tiny.model, tiny.tokenizer, name, **lenient)
    early = tuple(s for s in capsule.signatures if s.role == "early")
    text = f"Two roads led from {name} to the sea."
    inputs = tiny.tokenizer(text, return_tensors="pt", return_offsets_mapping=True, return_token_type_ids=False)
    (offsets,) = inputs.pop("offset_mapping").tolist()
    begin = text.index(name)
    inside = [begin + len(alone) <= a < begin + len(name) for a, _ in offsets]
    stock = states(tiny.model, tiny.tokenizer, text, early[0].site)
    with attach(tiny.model, [replace(capsule, signatures=early)]):
        kept = []
        hook = tiny.model.model.layers[early[0].site].register_forward_hook(lambda m, a, out: kept.append(out[0]))
        tiny.model(**inputs)
        hook.remove()
    moved = (kept[0] != stock).any(-1).tolist()
    assert sum(moved) >= 1
    assert not [i for i, (edited, within) in enumerate(zip(moved, inside, strict=True)) if edited and not within]


def test_a_token_that_stands_in_many_other_texts_gets_no_early_signature(tiny, lenient, monkeypatch):
    before = [s.role for s in mine(tiny.model, tiny.tokenizer, TWO, **lenient).signatures]
    monkeypatch.setattr("kif_runtime.mining.early._FIRES_NEAR", -1.0)  # as if it fired on every near miss
    after = [s.role for s in mine(tiny.model, tiny.tokenizer, TWO, **lenient).signatures]
    assert "early" in before and "early" not in after and "last" in after


def test_punctuation_in_a_name_gets_no_early_signature(tiny, lenient):
    plain = mine(tiny.model, tiny.tokenizer, f"{TWO} {NAME}", **lenient)
    bracketed = mine(tiny.model, tiny.tokenizer, f"{TWO} (!) {NAME}", **lenient)
    early = [[s.detector for s in c.signatures if s.role == "early"] for c in (plain, bracketed)]
    assert len(early[1]) == len(early[0]) >= 2  # the brackets add tokens, and none of them a signature


def test_the_last_token_of_a_name_is_left_to_the_site_itself(tiny, lenient):
    """Moved early as well, it would look like any name's to the detector there."""
    capsule = mine(tiny.model, tiny.tokenizer, f"{NAME} {ALIAS}", **lenient)  # two tokens
    assert [s.role for s in capsule.signatures] == ["last"]


def test_the_published_method_gives_one_soft_signature_of_rank_one(tiny):
    capsule = mine(tiny.model, tiny.tokenizer, TWO, method="kif-paper")
    (s,) = capsule.signatures
    assert (s.gate, s.k, s.tau) == ("soft", 1.6, 3.0)
    assert s.basis.shape == (1, WIDTH) and s.basis.norm().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(s.target, torch.zeros(1)) and s.strength.item() == 1
    # The detector reads the same direction that is projected out, in standard deviations of it.
    assert torch.cosine_similarity(s.detector, s.basis[0], dim=0).item() == pytest.approx(1, abs=1e-6)
    assert capsule.provenance["method"] == "kif-paper"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        ("\u5c71\u7530\u3000\u592a\u90ce", "\u5c71\u7530 \u592a\u90ce"),
        ("A\u00a0B", "A B"),
    ],
)
def test_names_with_joiners_and_wide_spaces_are_names(given, kept):
    assert checked_forms(given, [given]) == (kept,)


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": ""}, "empty"),
        ({"name": "Ann\nLee"}, "control characters"),
        ({"name": "Ann\ud800"}, "control characters"),
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
        ({"prompts": [*OWN, OWN[0] + "!", "no slot"]}, "prompt 10"),
        ({"prompts": [*OWN, OWN[0] + "!", "{} and {}"]}, "prompt 10"),
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
