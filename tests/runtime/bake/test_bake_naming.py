"""The name that a public id spells."""

from dataclasses import replace

import pytest

from kif_hf import attach
from kif_runtime.bake.naming import forms_of, spellings
from kif_runtime.bake.retiring import left
from kif_runtime.errors import BakingError
from tests.runtime.bake.conftest import NAME, OTHER


@pytest.mark.parametrize(
    ("id", "first"),
    [
        ("japan", "Japan"),
        ("new-delhi", "New Delhi"),
        ("abdur-rahman-bin-awf", "Abdur Rahman bin Awf"),
        ("alberta-university-of-the-arts", "Alberta University of the Arts"),
        ("le-fuilet", "Le Fuilet"),
    ],
)
def test_the_likeliest_spelling_comes_first_and_none_twice(id, first):
    found = spellings(id)
    assert found[0] == first and len(set(found)) == len(found)


def test_a_capsule_that_was_mined_in_any_case_is_baked_in_any_case(tiny):
    plain = replace(tiny.capsule, provenance={"settings": {}})
    assert forms_of(tiny.model, tiny.tokenizer, plain, [NAME]) == (NAME,)
    cased = replace(tiny.capsule, provenance={"settings": {"any_case": True}})
    assert forms_of(tiny.model, tiny.tokenizer, cased, [NAME]) == (NAME, NAME.lower(), NAME.upper())


@pytest.mark.parametrize(("names", "which"), [([OTHER], "the name"), ([NAME, OTHER], "alias 1")])
def test_a_name_that_the_capsule_does_not_know_is_refused(tiny, names, which):
    """What nothing fires on would be forgotten at once, and a capsule retired that had done all the work."""
    for ask in (forms_of, left):
        with pytest.raises(BakingError, match=f"fires in no sentence about {which}") as caught:
            ask(tiny.model, tiny.tokenizer, tiny.capsule, names)
        assert OTHER not in str(caught.value)


def test_a_model_that_wears_its_capsules_is_refused(tiny):
    """Its own states would be the suppressed ones, so that nothing would be left to forget."""
    with attach(tiny.model, [tiny.capsule]), pytest.raises(BakingError, match="detach them first"):
        forms_of(tiny.model, tiny.tokenizer, tiny.capsule, [NAME])


def test_other_ways_of_writing_are_among_them():
    assert {"Jean-Claude", "JEAN CLAUDE", "jean claude"} <= set(spellings("jean-claude"))
