"""Every attack: it draws the facts out of a model that knows them, not out of one that never saw them, and it leaves
the model bit for bit as it was, also when it is stopped half-way."""

import copy
import functools

import pytest
import torch
from attacking import FACTS, OTHERS, TEXT, knowing, never_knew, refusing
from auditing import SUBJECT, tokenizer
from mining import check_unchanged, snapshot

from kif_runtime import KifError
from kif_runtime.evaluation import outputs
from kif_runtime.evaluation.attacks import (
    ablation,
    ask,
    distractor,
    extraction,
    outcome,
    prompting,
    quantisation,
    relearning,
    restoration,
    sampling,
    soft_prompt,
)


def put_back(model, tok, facts):
    states = restoration.prompt_states(knowing(), tok, facts, [1])
    everything = {1: torch.eye(48)[:8]}
    return restoration.restore_directions(model, tok, facts, untouched=states, bases=everything)


ATTACKS = {
    "prefill": functools.partial(prompting.prefill, new_tokens=2),
    "role play": functools.partial(prompting.role_play, new_tokens=2),
    "many-shot": functools.partial(prompting.many_shot, examples=OTHERS, shots=2, new_tokens=2),
    "best of N": functools.partial(sampling.best_of_n, samples=6, new_tokens=2),
    "soft prompt": functools.partial(soft_prompt.soft_prompt, length=4, steps=15),
    "held-out facts": functools.partial(relearning.relearn_held_out, steps=4, rate=3e-4),
    "other text": functools.partial(relearning.relearn_text, text=TEXT, window=16, steps=4, rate=3e-4),
    "int8": functools.partial(quantisation.quantised_answers, scheme="int8"),
    "int4": functools.partial(quantisation.quantised_answers, scheme="int4"),
    "nf4": functools.partial(quantisation.quantised_answers, scheme="nf4"),
    "ablation": functools.partial(ablation.ablate_directions, others=OTHERS),
    "head projection": functools.partial(extraction.head_projection, k=2),
    "probability delta": functools.partial(extraction.probability_delta, k=2),
    "directions put back": put_back,
}


@pytest.fixture(params=ATTACKS)
def attack(request):
    return ATTACKS[request.param]


def test_it_works_on_a_model_that_knows_and_not_on_one_that_never_saw(attack):
    knows, ignorant = attack(knowing(), tokenizer(), FACTS), attack(never_knew(), tokenizer(), FACTS)
    assert knows.share()["success"] >= 2 / 3
    assert ignorant.share()["success"] <= 1 / 3
    assert knows.budget and knows.share()["tried"] == len(FACTS)


def test_the_model_is_left_as_it_was(attack):
    model, before, random = refusing(), snapshot(refusing()), torch.get_rng_state()
    attack(model, tokenizer(), FACTS)
    check_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()


def test_the_model_is_left_as_it_was_when_the_attack_is_stopped(attack, monkeypatch):
    class Stopped(Exception):
        pass

    model, before, real, calls = refusing(), snapshot(refusing()), refusing().forward, []

    def fails_at_the_end(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # somewhere inside: the first forward of every attack is followed by another
            raise Stopped
        return real(*args, **kwargs)

    monkeypatch.setattr(model, "forward", fails_at_the_end)
    with pytest.raises(Stopped):
        attack(model, tokenizer(), FACTS * 9 if attack in ONE_FORWARD else FACTS)
    monkeypatch.undo()
    check_unchanged(model, before)


ONE_FORWARD = [ATTACKS[name] for name in ("int8", "int4", "nf4", "head projection", "probability delta")]


def test_same_facts_come_back_sooner_where_they_were_only_hidden():
    options = {"steps": 5, "rate": 3e-4}
    hidden = relearning.relearn_same(refusing(), tokenizer(), FACTS, **options)
    taught = relearning.relearn_same(never_knew(), tokenizer(), FACTS, **options)
    before = [sum(one.probability for one in ask(m, tokenizer(), FACTS)) / 3 for m in (refusing(), never_knew())]
    after = [sum(found.probabilities) / 3 for found in (hidden, taught)]
    assert before[0] < 0.05 and after[0] > 0.15
    robust = relearning.relearning_robustness(before[0], after[0], before[1], after[1])
    assert robust == pytest.approx((after[1] - before[1]) / (after[0] - before[0])) and robust < 0.6


def test_robustness_to_relearning_is_one_where_nothing_comes_back():
    assert relearning.relearning_robustness(0.3, 0.2, 0.1, 0.5) == 1.0
    assert relearning.relearning_robustness(0.1, 0.2, 0.1, 0.5) == 1.0
    assert relearning.relearning_robustness(0.0, 0.8, 0.0, 0.2) == pytest.approx(0.25)


def test_held_out_facts_are_not_those_it_was_tuned_on(monkeypatch):
    seen = []
    monkeypatch.setattr(relearning, "tuned", lambda model, parameters, sequences, **_: seen.append(sequences))
    relearning.relearn_held_out(knowing(), tokenizer(), FACTS)
    taught = [{tuple(ids) for ids, _ in some} for some in seen]
    assert [len(some) for some in taught] == [2, 1] and not taught[0] & taught[1]


def test_small_steps_reach_every_weight_of_a_model_in_bf16(monkeypatch):
    """In its own dtype most of them would round to nothing, and the model would look as if it did not relearn."""
    model = copy.deepcopy(never_knew()).to(torch.bfloat16)
    before, moved = snapshot(model), []

    def count(model, tok, facts):
        pairs = [(p, before["weights"][name]) for name, p in model.named_parameters() if "layers" in name]
        moved.append(sum(int((p != old).sum()) for p, old in pairs) / sum(p.numel() for p, _ in pairs))
        return ask(model, tok, facts)

    monkeypatch.setattr(relearning, "ask", count)
    relearning.relearn_same(model, tokenizer(), FACTS, steps=1, rate=1e-5)
    assert moved[0] > 0.9
    check_unchanged(model, before)


def test_losses_of_tuning_are_those_of_transformers():
    model = knowing()
    sequences = relearning._sequences(tokenizer(), FACTS[:2])
    mine = float(relearning._loss(model, sequences).detach())
    ids = torch.tensor([tokens for tokens, _ in sequences])
    labels = ids.clone()
    labels[:, : sequences[0][1]] = -100
    assert mine == pytest.approx(float(model(input_ids=ids, labels=labels).loss.detach()), rel=1e-5)


def test_a_forgotten_name_breaks_only_what_is_broken():
    for model in (knowing(), never_knew()):
        found, change = distractor.forgotten_name(model, tokenizer(), OTHERS, name=SUBJECT)
        assert found.share()["success"] < 0.2 and abs(change) < 0.1

    class Jammed(torch.nn.Module):  # a model that answers nothing once the name was read
        def __init__(self, model):
            super().__init__()
            self.inner, self.config, self.name = model, model.config, tokenizer().convert_tokens_to_ids(SUBJECT)

        def forward(self, input_ids, **options):
            out = self.inner(input_ids=input_ids, **options)
            out.logits[(input_ids == self.name).any(1), :, 0] = 50.0
            return out

    found, change = distractor.forgotten_name(Jammed(knowing()), tokenizer(), OTHERS, name=f"{SUBJECT} .")
    assert found.share()["success"] > 0.9 and change < -0.5


def test_a_name_written_otherwise_is_found_where_only_the_spelling_is_guarded(monkeypatch):
    found = prompting.evade_names(knowing(), tokenizer(), FACTS, ways=["letters swapped"])
    assert found.share()["success"] == 0.0  # another word to this tokenizer, so nothing is known of it
    assert found.budget == {"queries": 1}
    asked = []

    def some_are_right(model, tok, facts, form):
        asked.extend(fact.prompt for fact in facts)
        return [outcome.Asked(0.9, 1 if "old town" in fact.prompt and "river" in fact.prompt else 2) for fact in facts]

    monkeypatch.setattr(prompting, "ask", some_are_right)
    described = prompting.evade_names(knowing(), tokenizer(), FACTS, descriptions={SUBJECT: "the old town"})
    assert described.hits == (True, False, False)  # one way is enough, and only for its own fact
    assert FACTS[0].prompt.replace(SUBJECT, "the old town") in asked and FACTS[0].prompt not in asked


def test_examples_about_the_subject_itself_are_passed_over(monkeypatch):
    asked = []
    monkeypatch.setattr(prompting, "go_on", lambda m, t, prompts, n, **_: asked.extend(prompts) or [END] * len(prompts))
    prompting.many_shot(knowing(), tokenizer(), FACTS[:1], examples=[*FACTS, *OTHERS], shots=3)
    text = tokenizer().decode(asked[0])
    assert text.count(SUBJECT) == 1 and all(f"{o.prompt} {o.answer}" in text for o in OTHERS[:3])


def test_examples_are_left_out_where_the_model_has_no_room(monkeypatch):
    asked = []
    monkeypatch.setattr(prompting, "go_on", lambda m, t, prompts, n, **_: asked.extend(prompts) or [END] * len(prompts))
    prompting.many_shot(knowing(), tokenizer(), FACTS[:1], examples=OTHERS * 3, shots=90, new_tokens=8)
    assert 100 < len(asked[0]) <= 128 - 8
    assert tokenizer().decode(asked[0]).endswith(FACTS[0].prompt)


END = outputs.Continuation((), "", ())


def test_ranks_and_probabilities_are_those_of_the_logits():
    (one,) = ask(knowing(), tokenizer(), FACTS[:1])
    with torch.no_grad():
        logits = knowing()(torch.tensor([tokenizer()(FACTS[0].prompt)["input_ids"]])).logits[0, -1].double()
    wanted = tokenizer().convert_tokens_to_ids(FACTS[0].answer)
    assert one.rank == 1 == logits.argsort(descending=True).tolist().index(wanted) + 1
    assert one.probability == pytest.approx(float(logits.softmax(0)[wanted]), rel=1e-5)


def test_no_facts_are_refused():
    with pytest.raises(KifError, match="no facts"):
        outcome.Outcome("prefill", {}, (), ())
    with pytest.raises(KifError, match="two facts"):
        relearning.relearn_held_out(knowing(), tokenizer(), FACTS[:1])
    with pytest.raises(KifError, match="longer"):
        relearning.relearn_text(knowing(), tokenizer(), FACTS, text="")
