"""Reading a model: token ids, and states under signatures."""

from dataclasses import replace

import torch

from kif_hf import attach
from kif_runtime import mine
from kif_runtime.mining.reading import Reader
from tests.mining import NAME, TWO, states


def test_the_ends_of_rows_of_ids_are_the_states_of_their_last_tokens(tiny):
    texts = ["Two roads led to the sea.", "In May", "We saw it again in June, and once more in the winter."]
    rows = [tiny.tokenizer(text).input_ids for text in texts]
    ends = Reader(tiny.model, tiny.tokenizer).ends(rows, 1)
    for row, text in zip(ends, texts, strict=True):
        torch.testing.assert_close(row, states(tiny.model, tiny.tokenizer, text, 1)[-1], rtol=1e-4, atol=1e-4)


def test_states_under_signatures_are_those_of_a_model_they_are_attached_to(tiny, monkeypatch):
    for bound in ("_FIRES_ELSEWHERE", "_FIRES_NEAR"):
        monkeypatch.setattr(f"kif_runtime.mining.early.{bound}", 1.0)  # in random weights no token tells anything
    capsule = mine(tiny.model, tiny.tokenizer, TWO, steps=0, false_positive_rate=0.01)
    early = [s for s in capsule.signatures if s.role == "early"]
    reader, text = Reader(tiny.model, tiny.tokenizer), f"Two roads led from {TWO} to {NAME}."
    site = early[0].site + 1
    with reader.suppressing(early):
        (ours,) = reader.states([text], site)
    with attach(tiny.model, [replace(capsule, signatures=tuple(early))]):
        theirs = states(tiny.model, tiny.tokenizer, text, site)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, states(tiny.model, tiny.tokenizer, text, site), rtol=1e-2, atol=1e-2)
    with reader.suppressing([]):
        (again,) = reader.states([text], 1)
    torch.testing.assert_close(again, states(tiny.model, tiny.tokenizer, text, 1), rtol=1e-4, atol=1e-4)
