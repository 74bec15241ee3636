"""The name that a public id spells."""

import pytest

from kif_runtime.bake.naming import spellings


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


def test_other_ways_of_writing_are_among_them():
    assert {"Jean-Claude", "JEAN CLAUDE", "jean claude"} <= set(spellings("jean-claude"))
