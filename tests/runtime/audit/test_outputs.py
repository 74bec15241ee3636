"""What an audit asks of a model, against one prompt at a time; and what it saves."""

import copy
import dataclasses
from contextlib import contextmanager

import pytest
import torch
from evaluating import FACTS, fact, tokenizer

from kif_runtime import KifError, ModelError
from kif_runtime.blocks import decoder_blocks
from kif_runtime.evaluation import answer_probabilities, prior_probabilities
from kif_runtime.evaluation.audit import Audit, Subject
from kif_runtime.evaluation.knowledge import probability_and_rank, share_greedy
from kif_runtime.evaluation.outputs import Outputs, go_on, read
from kif_runtime.evaluation.questions import variants
from kif_runtime.evaluation.states import State, bare
from kif_runtime.evaluation.suites import run_suites
from kif_runtime.fingerprint import fingerprint

PROMPTS = [(5, 9, 20), (33, 7, 11, 12, 13), (40,), (5, 9, 21)]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tiny_model):
    return tiny_model(request.param, seed=4)


@contextmanager
def sharper(model):
    model.get_output_embeddings().weight.data *= 3
    try:
        yield model
    finally:
        model.get_output_embeddings().weight.data /= 3


def audit(model, **options):
    after = State("after", lambda: sharper(model), "sharper")
    given = {"subjects": [Subject("Arland")], "facts": [FACTS[0]], "others": FACTS[1:]} | options
    return Audit(bare(model), after, tokenizer(), **given)


def test_readings_are_those_of_one_prompt_at_a_time(model):
    for prompt, found in zip(PROMPTS, read(model, PROMPTS, batch_size=3), strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([prompt]), output_hidden_states=True)
        torch.testing.assert_close(found.log_probs, alone.logits[0, -1].log_softmax(-1), rtol=1e-4, atol=1e-4)
        states = torch.stack(alone.hidden_states[1:])[:-1, 0, -1]  # the last one is normed there
        torch.testing.assert_close(found.blocks[:-1], states, rtol=1e-4, atol=1e-4)


def test_continuations_and_their_mass_are_those_of_a_loop_without_cache(model):
    ends = {model.generation_config.eos_token_id}
    found = go_on(model, tokenizer(), PROMPTS, 6, [(1, 50), (3,), (), (60, 61)], batch_size=3)
    for prompt, watched, one in zip(PROMPTS, [(1, 50), (3,), (), (60, 61)], found, strict=True):
        ids, mass = list(prompt), []
        while len(ids) < len(prompt) + 6 and not (len(ids) > len(prompt) and ids[-1] in ends):
            with torch.no_grad():
                p = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
            mass.append(float(p[list(watched)].sum()))
            ids.append(int(p.argmax()))
        assert one.ids == tuple(ids[len(prompt) :])
        assert one.mass == pytest.approx(mass, rel=1e-3)


def test_what_was_asked_before_needs_no_forward(model):
    one = audit(model)
    first = one.read(one.before, PROMPTS)
    assert (one.outputs.asked, one.outputs.saved) == (4, 0)
    again = one.read(one.before, [*PROMPTS[::-1], (1, 2)])
    assert (one.outputs.asked, one.outputs.saved) == (9, 4)
    assert [id(a) for a in again[:4]] == [id(a) for a in first[::-1]]
    other = one.read(one.after, PROMPTS)  # another state is asked anew
    assert (one.outputs.asked, one.outputs.saved) == (13, 4)
    assert not torch.allclose(other[0].log_probs, first[0].log_probs)


def test_states_of_one_key_share_what_was_asked_and_others_do_not(model):
    one = audit(model)
    one.after = bare(model, "after")
    first = one.read(one.before, PROMPTS)
    assert one.read(one.after, PROMPTS)[0] is first[0] and one.outputs.saved == 4
    elsewhere = copy.deepcopy(model)
    attention = next(p for n, p in decoder_blocks(elsewhere)[1].named_parameters() if "q_proj" in n or "c_attn" in n)
    attention.data *= 1.5
    assert fingerprint(elsewhere) == fingerprint(model)  # it does not read every weight
    one.after = bare(elsewhere, "after")
    assert one.key != dataclasses.replace(one, after=bare(model, "after")).key
    other = one.read(one.after, PROMPTS)
    assert one.outputs.saved == 4 and not torch.equal(other[0].log_probs, first[0].log_probs)


def test_a_changed_data_file_is_another_audit(model, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("one\n")
    keys = [audit(model, data={"utility": tmp_path}).key for _ in range(2)]
    file.write_text("another\n")
    assert keys[0] == keys[1] != audit(model, data={"utility": tmp_path}).key


def test_what_takes_longer_is_made_once_and_counts_its_prompts(model):
    one, made = audit(model), []

    def measured(on):
        made.append(on.model)
        return [1, 2, 3]

    assert one.once(one.before, ["it", 1], measured, len) is one.once(one.before, ["it", 1], measured, len)
    assert made == [model] and (one.outputs.asked, one.outputs.saved) == (6, 3)
    one.once(one.after, ["it", 1], measured, len)
    one.once(one.before, ["it", 2], measured, len)
    assert len(made) == 3
    store = Outputs()
    store.take(one.outputs.of(one.before.identity))
    assert store.get([(*one.before.identity, "it", 1)], lambda some: [None]) == [[1, 2, 3]]


def test_a_prompt_that_stands_twice_is_asked_once():
    made = []
    store = Outputs()
    assert store.get(["a", "b", "a"], lambda some: made.extend(some) or [f"made {i}" for i in some]) == [
        "made 0",
        "made 1",
        "made 0",
    ]
    assert made == [0, 1] and store.saved == 1


def test_the_oldest_outputs_go_when_room_is_short():
    @dataclasses.dataclass
    class Thing:
        nbytes: int = 40

    store = Outputs(room=100)
    store.get("abc", lambda some: [Thing() for _ in some])
    store.get("cb", lambda some: [Thing() for _ in some])
    assert store.saved == 2
    store.get("a", lambda some: [Thing() for _ in some])
    assert store.saved == 2  # it had gone


def test_probabilities_and_priors_are_those_measured_apart(model):
    one, words = audit(model, facts=FACTS[:2]), tokenizer()
    for form in ("bare", "chat"):
        expected = answer_probabilities(model, words, one.facts, form=form)
        assert one.probabilities(one.before, one.facts, form) == pytest.approx(expected, rel=1e-4)
        assert one.priors(one.facts, form) == pytest.approx(prior_probabilities(model, words, one.facts, form=form))
    with sharper(model):
        expected = answer_probabilities(model, words, one.facts)
    assert one.probabilities(one.after, one.facts) == pytest.approx(expected, rel=1e-4)


def test_rank_one_is_what_greedy_decoding_says(model):
    words, one = tokenizer(), audit(model)
    ids = words(FACTS[0].prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        order = model(ids).logits[0, -1].argsort(descending=True).tolist()
    own = words.convert_tokens_to_ids("Ara")
    ((_, rank),) = probability_and_rank(one, one.before, [FACTS[0]])
    assert rank == order.index(own) + 1
    assert share_greedy([1, 3, 1, 2]) == 0.5


def test_a_model_of_no_numbers_is_refused(tiny_model):
    broken = tiny_model("llama", seed=4)
    broken.lm_head.weight.data[3, 2] = float("nan")
    one = audit(broken)
    for ask in (lambda: one.read(one.before, PROMPTS), lambda: one.go_on(one.before, PROMPTS, 3)):
        with pytest.raises(ModelError, match="not finite"):
            ask()


def test_one_state_is_on_at_a_time(model):
    one = audit(model)
    with one.running(one.after) as on, one.running(one.after) as again:
        assert again is on
        with pytest.raises(RuntimeError, match="after is on"), one.running(one.before):
            pass


def test_choices_are_seeded_by_name(model):
    one, other = audit(model), audit(model, seed=1)
    assert one.random("a").random() == one.random("a").random() != one.random("b").random()
    assert one.random("a").random() != other.random("a").random()
    assert torch.equal(torch.rand(3, generator=one.generator("x")), torch.rand(3, generator=one.generator("x")))
    assert (one.pick(quick=1, full=2), audit(model, quick=True).pick(quick=1, full=2)) == (2, 1)


def test_questions_made_by_rule(model):
    subject = Subject("Arland", ("Big Arland",), ("the old town",))
    one = audit(model, subjects=[subject], facts=[fact("Arland", "Ara", others=("Berland",))])
    made = {kind: [question for question, _ in pairs] for kind, pairs in variants(one, one.facts).items()}
    assert [q.prompt for q in made["alias"]] == ["the capital of Big Arland is"]
    assert [q.prompt for q in made["described"]] == ["the capital of the old town is"]
    assert [q.prompt for q in made["misspelling"]] == ["the capital of Alrand is"]
    (question,) = made["in context"]
    assert question.prompt.endswith(". the capital of Arland is")
    assert question.asked_of_others()[0].prompt == question.prompt.replace("Arland", "Berland")
    assert all(q.question_kind == kind for kind, some in made.items() for q in some)


def test_a_stopped_audit_goes_on_where_it_was(model, tmp_path, monkeypatch):
    options = {"facts": [fact("Arland", "Ara")], "least_excess": 1e-6}
    first = run_suites(audit(model, **options), ["neighbours", "facts"], folder=tmp_path)
    assert (tmp_path / "facts.json").stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr("kif_runtime.evaluation.knowledge.run", lambda audit: pytest.fail("measured again"))
    again = run_suites(audit(model, **options), ["neighbours", "facts"], folder=tmp_path)
    assert again["facts"]["kept"]["mean"] == first["facts"]["kept"]["mean"]
    (tmp_path / "neighbours.json").write_text("{")  # damaged: measured anew
    assert run_suites(audit(model, **options), ["neighbours"], folder=tmp_path)["neighbours"] == first["neighbours"]
    with pytest.raises(pytest.fail.Exception):  # another seed is another audit
        run_suites(audit(model, seed=1, **options), ["facts"], folder=tmp_path)


def test_unknown_suites_are_refused(model):
    with pytest.raises(KifError, match="unknown suite 'sung'"):
        run_suites(audit(model), ["facts", "sung"])
