"""Examples, their batches, and the order they come in."""

import pytest
import torch

from kif_runtime.bake.data import Subject, gathered, held_out, own_examples
from kif_runtime.bake.examples import Example, batches, collate
from kif_runtime.bake.order import drawn, seeded
from kif_runtime.errors import BakingError
from tests.runtime.bake.conftest import NAME, OTHER


def test_a_batch_is_padded_and_marked():
    batch = collate([Example((5, 6, 7), 2, 0, (1,)), Example((8,), 0)], [4, 9])
    assert batch.ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.completion.tolist() == [[False, False, True], [True, False, False]]
    assert batch.name.tolist() == [[False, True, False], [False] * 3]
    assert (batch.subject.tolist(), batch.index.tolist()) == ([0, -1], [4, 9])
    assert batch.alternative is None


def test_other_completions_come_along_where_all_have_one():
    batch = collate([Example((5, 6), 1, alternative=(5, 9, 9)), Example((7, 8), 1, alternative=(7, 4))], [0, 1])
    assert batch.alternative.ids.tolist() == [[5, 9, 9], [7, 4, 0]]
    assert batch.alternative.completion.tolist() == [[False, True, True], [False, True, False]]
    assert collate([Example((5, 6), 1, alternative=(5, 9)), Example((7,))], [0, 1]).alternative is None


def test_batches_hold_every_example_once():
    examples = [Example(tuple(range(1, 2 + n % 5))) for n in range(23)]
    found = [int(i) for batch in batches(examples, rows=4) for i in batch.index]
    assert sorted(found) == list(range(23))


def test_every_example_is_drawn_once_in_an_epoch():
    rows, count = 4, 10
    order = [i for step in range(15) for i in drawn(3, "forget", step, rows, count)]
    epochs = [order[start : start + count] for start in range(0, 60, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_draw_follows_from_seed_and_step_alone():
    alone = drawn(3, "forget", 7, 4, 10)
    assert [drawn(3, "forget", step, 4, 10) for step in range(9)][7] == alone
    assert drawn(4, "forget", 7, 4, 10) != alone or drawn(4, "forget", 8, 4, 10) != drawn(3, "forget", 8, 4, 10)
    assert not torch.equal(torch.rand(4, generator=seeded(0, "a")), torch.rand(4, generator=seeded(0, "b")))


def test_forget_text_names_the_subject_and_retain_text_does_not(tiny, data):
    name = tiny.tokenizer.convert_tokens_to_ids(NAME)
    for example in data.forget:
        assert example.subject == 0
        assert [example.ids[i] for i in example.name] == [name] * example.ids.count(name) != []
    assert all(name not in e.ids and e.subject == -1 for e in data.retain)


def test_what_validates_is_not_trained_on(tiny, data):
    trained = {e.ids for e in data.forget} | {e.ids for e in data.retain}
    assert data.held_forget and data.held_retain
    assert not trained & {e.ids for e in (*data.held_forget, *data.held_retain)}
    subject = [Subject(tiny.capsule, (NAME,))]
    assert held_out(tiny.tokenizer, subject) == (data.held_forget, data.held_retain)


def test_another_subject_that_is_baked_along_is_never_to_be_kept(tiny):
    both = gathered(tiny.tokenizer, [Subject(tiny.capsules[n], (n,)) for n in (NAME, OTHER)])
    names = set(tiny.tokenizer.convert_tokens_to_ids([NAME, OTHER]))
    assert {e.subject for e in both.forget} == {0, 1}
    assert not any(names & set(e.ids) for e in (*both.retain, *both.held_retain))


def test_own_examples_are_used_as_their_split_says(tiny, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(
        '{"prompt": "the city of Zembla is", "completion": " old", "split": "forget"}\n\n'
        '{"prompt": "Berlin is", "completion": " a city", "split": "retain"}\n'
    )
    found = gathered(tiny.tokenizer, [Subject(tiny.capsule, (NAME,))], own_examples(path))
    prompt = tiny.tokenizer("the city of Zembla is").input_ids
    assert found.forget[-1].ids[: len(prompt)] == tuple(prompt) and found.forget[-1].start == len(prompt)
    assert tiny.tokenizer.decode(found.forget[-1].ids[len(prompt) :]) == "old"
    assert found.retain[-1].start == len(tiny.tokenizer("Berlin is").input_ids)


def test_an_own_text_without_a_prompt_is_its_own_completion(tiny, data):
    from kif_runtime.bake.adapter import adapted
    from kif_runtime.bake.completions import completed
    from kif_runtime.bake.passes import Passes
    from kif_runtime.bake.settings import Settings

    row = {"prompt": "", "completion": "the city of Zembla is old", "split": "forget"}
    given = gathered(tiny.tokenizer, [Subject(tiny.capsule, (NAME,))], [row]).forget[-1]
    assert tiny.tokenizer.decode(given.ids) == row["completion"] and given.start == 1  # nothing foretells the first
    with adapted(tiny.model, Settings(rank=2), seed=0) as wrapped:
        (made,) = completed(Passes(wrapped, [tiny.capsule]), tiny.tokenizer, [given], None, seed=0)
    assert made == given


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no examples"),
        ("[]\n", "line 1: not an object"),
        ('{"prompt": "a", "completion": "b", "split": "keep"}', 'line 1: "split" is neither'),
        ('\n{"prompt": "", "completion": " ", "split": "retain"}', "line 2: prompt and completion are empty"),
    ],
)
def test_a_bad_file_of_examples_is_refused(tmp_path, text, told):
    path = tmp_path / "own.jsonl"
    path.write_text(text)
    with pytest.raises(BakingError, match=told):
        own_examples(path)
