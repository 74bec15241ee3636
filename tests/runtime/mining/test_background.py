"""Negatives beyond the control texts: strange tokens, what a model wrote, and text of the user's own."""

import re

import pytest
import torch

from kif_runtime import MiningError, mine
from kif_runtime.mining import prepare
from kif_runtime.mining.background import strange_rows, text_rows
from kif_runtime.mining.corpus import corpus
from kif_runtime.mining.reading import normalised
from tests.mining import DAY, NAME, states

OWN = ["The lamp on the desk was lit.", "Nobody asked why. It rained for a week and the road was closed."]


def test_every_token_of_the_vocabulary_is_met_once(tiny):
    rows = strange_rows(tiny.tokenizer, tiny.corpus.passages)
    met = [row[place] for row, places in zip(rows.ids, rows.places, strict=True) for place in places]
    assert sorted(met) == sorted(set(range(len(tiny.tokenizer))) - set(tiny.tokenizer.all_special_ids))
    natural = {token for p in tiny.corpus.passages for token in tiny.tokenizer(p).input_ids}
    for row, places in zip(rows.ids, rows.places, strict=True):
        assert set(row) - {row[place] for place in places} <= natural


def test_their_states_are_the_models_own(tiny):
    control = prepare(tiny.model, tiny.tokenizer)
    rows = strange_rows(tiny.tokenizer, tiny.corpus.passages)
    first = control.texts.index(rows.texts[0])
    for number in (0, len(rows.ids) - 1):
        with torch.no_grad():
            hidden = tiny.model(torch.tensor([rows.ids[number]]), output_hidden_states=True).hidden_states
        expected = normalised(hidden[control.site + 1][0, list(rows.places[number])])
        got = control.states[control.text == first + number].float()
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def test_a_name_of_one_token_is_no_negative_of_itself(tiny):
    """Next to other tokens it is no whole word any more; the row it stands in is left out all the same."""
    control = prepare(tiny.model, tiny.tokenizer)
    rows = strange_rows(tiny.tokenizer, tiny.corpus.passages)
    (token,) = tiny.tokenizer(f" {NAME}").input_ids
    first = control.texts.index(rows.texts[0])
    met = [[row[q] for q in at] for row, at in zip(rows.ids, rows.places, strict=True)]
    (holder,) = (i for i, tokens in enumerate(met) if token in tokens)
    silent = control.silent(control.text, (NAME,))
    assert not silent[control.text == first + holder].any()
    assert silent.float().mean() > 0.5


def test_what_a_model_wrote_is_among_the_negatives_at_every_site(tiny):
    control = prepare(tiny.model, tiny.tokenizer)
    rows = text_rows(tiny.tokenizer, tiny.corpus.written)
    first = len(control.texts) - len(rows.ids)
    assert set(rows.texts) == set(tiny.corpus.written) and control.texts[first:] == rows.texts
    for number in (0, len(rows.ids) - 1):
        with torch.no_grad():
            hidden = tiny.model(torch.tensor([rows.ids[number]]), output_hidden_states=True).hidden_states
        expected = normalised(hidden[control.site + 1][0])[list(rows.places[number])]
        got = control.states[control.text == first + number].float()
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
    for level in (control.opening, control.early):
        assert (level.text >= first).any()


def test_what_ships_is_long_and_free_of_addresses():
    assert len(corpus().written) > 1000 and len(set(corpus().written)) == len(corpus().written)
    assert not any(re.search(r"https?:|www\.|\w@\w|\d{3}-\d{3}", text) for text in corpus().written)


def test_own_text_joins_the_negatives_and_is_not_kept(tiny):
    before = [(path, path.read_bytes()) for path in sorted(tiny.cache.rglob("*")) if path.is_file()]
    control = prepare(tiny.model, tiny.tokenizer)
    wider = prepare(tiny.model, tiny.tokenizer, passages=OWN)
    assert wider.texts[: len(control.texts)] == control.texts and wider.texts[len(control.texts) :] == tuple(OWN)
    for i, text in enumerate(OWN):
        expected = normalised(states(tiny.model, tiny.tokenizer, text, control.site))
        got = wider.states[wider.text == len(control.texts) + i].float()
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
    assert [(path, path.read_bytes()) for path in sorted(tiny.cache.rglob("*")) if path.is_file()] == before
    assert prepare(tiny.model, tiny.tokenizer, passages=OWN) is wider
    assert len(prepare(tiny.model, tiny.tokenizer).texts) == len(control.texts)


def test_a_long_passage_is_read_in_rows(tiny):
    rows = text_rows(tiny.tokenizer, [" ".join(OWN * 20)])
    ids = tiny.tokenizer(" ".join(OWN * 20)).input_ids
    assert len(rows.ids) > 1 and [t for row in rows.ids for t in row] == ids


def test_it_does_not_fire_where_own_text_says_so(tiny):
    """The text is written to set it off: it is full of another name's last word."""
    plain = mine(tiny.model, tiny.tokenizer, "Quillon Vane", date=DAY)
    text = [f"They met {first} Vane and left." for first in ("Harrow", "Ottoline", "Piet", "Marta", "Jonas", "Ines")]
    told = mine(tiny.model, tiny.tokenizer, "Quillon Vane", date=DAY, passages=text * 4)
    assert told.provenance["settings"]["own_text"] is True and "own_text" not in plain.provenance["settings"]
    assert fires(tiny, told, text) <= min(1, fires(tiny, plain, text))
    assert str(text[0]) not in str(told.provenance) + str(told.calibration)


def fires(tiny, capsule, texts) -> int:
    count = 0
    for s in capsule.signatures:
        for text in texts:
            x = normalised(states(tiny.model, tiny.tokenizer, text, s.site))
            count += int((x @ s.detector + s.bias > 0).sum())
    return count


@pytest.mark.parametrize("given", [["", "  "], "one string", [1]])
def test_text_that_is_none_is_refused(tiny, given):
    with pytest.raises(MiningError, match=r"empty|list of texts"):
        mine(tiny.model, tiny.tokenizer, NAME, passages=given)
