"""What is read of a model once: controls, their cache, and what is refused."""

import shutil

import pytest
import torch

from kif_runtime import KifError, MiningError, mine
from kif_runtime.fingerprint import fingerprint
from kif_runtime.mining import prepare, preparing
from tests.mining import NAME, states


def cached(folder) -> list:
    return sorted(folder.rglob("*.safetensors"))


def test_controls_are_read_once_and_then_come_from_the_cache(tiny, cache):
    told, forwards = [], []
    handle = tiny.model.lm_head.register_forward_hook(lambda *_: forwards.append(1))
    first = prepare(tiny.model, tiny.tokenizer, progress=lambda *now: told.append(now))
    assert forwards and cached(cache)
    forwards.clear()
    preparing._loaded.clear()
    second = prepare(tiny.model, tiny.tokenizer)
    assert prepare(tiny.model, tiny.tokenizer) is second
    handle.remove()
    assert not forwards
    for name in ("states", "text", "last", "entity", "mean", "scatter", "raw_mean", "neutral"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    for level in ("opening", "early"):
        for name in ("states", "text", "mean", "scatter", "usual"):
            assert torch.equal(getattr(getattr(first, level), name), getattr(getattr(second, level), name)), name
    assert torch.equal(first.kinds.weights, second.kinds.weights) and first.kinds.names == second.kinds.names
    assert first.texts == second.texts and first.known.keys() == second.known.keys()
    totals = list(dict.fromkeys(total for _, total, _ in told))  # of the controls, then of strange tokens
    assert len(totals) == 2
    for total in totals:
        done = [d for d, of, _ in told if of == total]
        assert done == sorted(done) and done[-1] == total


def test_another_site_or_model_gets_a_file_of_its_own(tiny, cache):
    shutil.copytree(tiny.cache, cache)
    (mine_,) = cached(cache)
    before = mine_.read_bytes()
    assert prepare(tiny.model, tiny.tokenizer, site=2).site == 2
    other = tiny.fresh(seed=1)
    assert prepare(other, tiny.tokenizer).fingerprint == fingerprint(other)
    assert len(cached(cache)) == 3 and mine_.read_bytes() == before


def test_a_truncated_cache_file_is_made_anew(tiny, cache):
    shutil.copytree(tiny.cache, cache)
    (path,) = cached(cache)
    whole = prepare(tiny.model, tiny.tokenizer)
    preparing._loaded.clear()
    path.write_bytes(path.read_bytes()[:-1000])
    mended = prepare(tiny.model, tiny.tokenizer)
    assert torch.equal(mended.states, whole.states) and torch.equal(mended.neutral, whole.neutral)
    assert path.stat().st_size == cached(tiny.cache)[0].stat().st_size


@pytest.mark.parametrize("in_the_way", ["cache", "cache/controls"])
def test_a_cache_that_cannot_be_written_is_one_line(tiny, cache, in_the_way):
    path = cache.parent / in_the_way
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file where a folder should be")
    with pytest.raises(KifError, match=r"cannot keep .*controls") as failure:
        prepare(tiny.model, tiny.tokenizer)
    assert "\n" not in str(failure.value)
    assert list(cache.parent.rglob("*")) in ([path], [path.parent, path])


def test_control_states_are_the_models_own(tiny):
    control = prepare(tiny.model, tiny.tokenizer)
    for number in (0, len(control.entity[control.entity >= 0]) - 1):
        x = states(tiny.model, tiny.tokenizer, control.texts[number], control.site).double()
        expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(control.states[control.text == number].double(), expected, rtol=2e-3, atol=2e-3)
    about = tiny.corpus.entities[int(control.entity[0])].name
    ids = tiny.tokenizer(control.texts[0]).input_ids
    (place,) = torch.where(control.last & (control.text == 0))[0]
    assert tiny.tokenizer.decode(ids[: int(place) + 1]).endswith(about)


@pytest.mark.parametrize("site", [-1, 4])
def test_a_site_that_is_no_block_is_refused(tiny, site):
    with pytest.raises(MiningError, match="0 to 3"):
        mine(tiny.model, tiny.tokenizer, NAME, site=site)
