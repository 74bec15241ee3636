"""Whether thresholds hold under an adapter: rates are those of the attached capsule, and a drift is noticed."""

import copy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kif_hf import attach
from kif_runtime.evaluation.thresholds import Rates, rates
from kif_runtime.mining.corpus import ANY
from tests.mining import NAME


@pytest.fixture(autouse=True)
def small(tiny, monkeypatch):
    monkeypatch.setattr(sys.modules["kif_runtime.evaluation.thresholds"], "corpus", lambda: tiny.corpus)


def drifted(tiny, size):
    config = LoraConfig(r=4, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(4)
    model = get_peft_model(copy.deepcopy(tiny.model), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data *= size
    return model.eval()


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_rates_are_those_of_the_capsule_when_it_is_attached(tiny, ostia, size):
    model = drifted(tiny, size)
    found = rates(model, tiny.tokenizer, ostia, [NAME])
    templates = [t for t in tiny.corpus.templates[ANY] if t.count("{}") == 1]
    recognised, false, tokens = 0, 0, 0
    with attach(model, [ostia]) as kif, torch.no_grad():
        for text in (t.replace("{}", NAME) for t in templates):
            kif.reset()
            model(**tiny.tokenizer(text, return_tensors="pt", return_token_type_ids=False))
            recognised += bool(kif.fired["ostia"])
        kif.reset()
        for text in tiny.corpus.passages:
            inputs = tiny.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            tokens += inputs.input_ids.numel()
            model(**inputs)
        false = kif.fired["ostia"]
    assert (found.prompts, found.tokens) == (len(templates), tokens)
    assert found.false_fires == pytest.approx(false / tokens)
    assert abs(found.recall - recognised / len(templates)) <= 0.1  # there also tokens that are not the name's count


def test_a_large_drift_is_noticed_and_none_is_none(tiny, ostia):
    bare = rates(tiny.model, tiny.tokenizer, ostia, [NAME])
    assert bare.recall > 0.9
    assert rates(drifted(tiny, 0.0), tiny.tokenizer, ostia, [NAME]).hold_against(bare)
    assert not rates(drifted(tiny, 3.0), tiny.tokenizer, ostia, [NAME]).hold_against(bare)


def test_without_a_name_only_false_fires_count(tiny, ostia):
    bare = rates(tiny.model, tiny.tokenizer, ostia)
    assert bare.recall is None and bare.prompts == 0
    assert bare._replace(false_fires=1e-4).hold_against(bare)
    assert not bare._replace(false_fires=0.1).hold_against(bare)
    assert not Rates(0.9, 10, 0.0, 10).hold_against(Rates(1.0, 10, 0.0, 10))
