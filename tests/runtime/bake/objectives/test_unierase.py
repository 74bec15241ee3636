"""UniErase on a tiny model: the token leads to the refusal, prompts lead to the token, and PEFT keeps both."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from workshop import Workshop, examples

from kif_runtime import BakingError
from kif_runtime.bake.examples import Example, collate
from kif_runtime.bake.objectives.tokens import mean_log_prob
from kif_runtime.bake.objectives.unierase import UniErase, name_ends
from kif_runtime.bake.objectives.unlearning_token import unused_token

TOKEN = 127
TIED = {"tie_word_embeddings": True, "initializer_range": 0.2}  # larger weights than usual: embeddings matter


def tokenizer(*special: str) -> SimpleNamespace:
    names = {"<s>": 1, "</s>": 2, "<chat>": 5, "<spare>": TOKEN}
    return SimpleNamespace(
        bos_token="<s>",
        eos_token="</s>",
        pad_token=None,
        unk_token=None,
        chat_template="{{ '<chat>' }}",
        added_tokens_decoder={
            n: type("T", (str,), {"special": True})(t) for t, n in names.items() if t in (special or names)
        },
        convert_tokens_to_ids=names.__getitem__,
    )


@pytest.fixture(scope="module")
def shop(tiny_model):
    model = tiny_model("llama", **TIED)
    return Workshop(model, UniErase(steps=(30, 30)), tokenizer=tokenizer())


def answers(shop, call, batch) -> torch.Tensor:
    with torch.no_grad():
        return call(batch, logits=True).logits


def test_after_the_token_the_model_refuses(shop):
    follow = [Example((*e.ids[: e.start], TOKEN, *e.alternative[e.start :]), e.start + 1) for e in shop.forget]
    batch = collate(follow, range(len(follow)))
    now, before = (
        mean_log_prob(answers(shop, call, batch), batch.ids, batch.completion)
        for call in (shop.passes.student, shop.passes.reference)
    )
    assert (now - before).mean() > 0.5


def test_forget_prompts_lead_to_the_token_and_others_do_not(shop):
    made = []
    for found in (shop.forget, shop.retain):
        rows = [Example(e.ids[: e.start]) for e in found]
        batch = collate(rows, range(len(rows)))
        now, before = (
            answers(shop, call, batch)[:, -1].log_softmax(-1)[:, TOKEN]
            for call in (shop.passes.student, shop.passes.reference)
        )
        made.append(now - before)
    forget, retain = made
    assert forget.mean() > 1 and forget.mean() > 3 * retain.abs().mean()


def test_a_new_process_loads_the_same_model_from_plain_peft(shop, tiny_model, tmp_path):
    shop.model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llama", **TIED), tmp_path)
    ids = torch.tensor([[3, 40, 20, 21, TOKEN, 50]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, shop.model(ids).logits)


def test_what_it_changes_outside_lora_is_reported(shop):
    assert "the embedding row of the token <spare>" in shop.objective.report()["outside_lora"]


def test_a_token_is_taken_only_where_no_chat_uses_it():
    assert unused_token(tokenizer(), None) == ("<spare>", TOKEN)
    assert unused_token(tokenizer(), "<chat>") == ("<chat>", 5)
    with pytest.raises(BakingError, match="no unused special token"):
        unused_token(tokenizer("<s>", "</s>", "<chat>"), None)
    with pytest.raises(BakingError, match="'x' is not a special token"):
        unused_token(tokenizer(), "x")


def test_the_name_s_last_token_is_found_or_the_row_s():
    named = examples(2, True, 0)
    batch = collate([*named, Example((5, 6, 7))], range(3))
    assert name_ends(batch).nonzero().tolist() == [[0, 3], [1, 3], [2, 2]]
