"""Tokens per second of `generate`: the bare model against capsules attached, and against steering libraries.

    pytest bench/bench_generate.py

Machines drift, so nothing is compared with a figure taken at another time: every call of a contender stands between
two calls of the bare model, each gives one ratio, contender ÷ bare in tokens per second, and the median over rounds is
printed with the quartiles; once by the clock, and once by the processor time of this process, which other programs on
the machine disturb less. All contenders run on copies of the model that share its weights.

KIF_BENCH_MODEL: the model (embedded). KIF_BENCH_CAPSULES: a folder of mined capsules (default: the fullest one that the
other scripts left in the cache folder). KIF_BENCH_MANY: how many "many" are (1000). KIF_BENCH_ROUNDS: rounds (15).
"""

import copy
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kif_hf import attach
from kif_runtime import Capsule, load_model
from kif_runtime.blocks import decoder_blocks, width
from kif_runtime.fingerprint import fingerprint
from kif_runtime.models import cache_folder

MANY = int(os.environ.get("KIF_BENCH_MANY", "1000"))
ROUNDS = int(os.environ.get("KIF_BENCH_ROUNDS", "15"))
NEW_TOKENS = 32
Cost = tuple[float, float]  # seconds by the clock, seconds of processor time
PROMPT = "On the way home from the market she stopped at the corner, looked at the old clock over the door and"


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[Any, Any]:
    return load_model(os.environ.get("KIF_BENCH_MODEL", "embedded"), device="cpu")


@pytest.fixture(scope="module")
def mined(model_and_tokenizer: tuple[Any, Any]) -> Callable[[int], list[Capsule]]:
    """mined(count) -> that many mined capsules, or the test is skipped."""
    folder = capsule_folder()
    paths = sorted(folder.glob("*.kif.safetensors")) if folder else []

    def some(count: int) -> list[Capsule]:
        if len(paths) < count:
            pytest.skip(f"{count} mined capsules are needed and {len(paths)} are there; run bench/many.py first")
        return [Capsule.load(path, fingerprint(model_and_tokenizer[0])) for path in paths[:count]]

    return some


def capsule_folder() -> Path | None:
    if own := os.environ.get("KIF_BENCH_CAPSULES"):
        return Path(own)
    folders = [p for p in (cache_folder() / "bench").glob("*") if p.is_dir()]
    return max(folders, key=lambda p: len(list(p.glob("*.kif.safetensors"))), default=None)


def sharing(model: Any) -> Any:
    """A copy of the model's modules on the same weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def bare(model: Any, mined: Any) -> Any:
    return model


def kif_one(model: Any, mined: Any) -> Any:
    attach(model, mined(1))
    return model


def kif_many(model: Any, mined: Any) -> Any:
    capsules = mined(MANY)
    attach(model, [], mandatory=capsules)
    return model


def steering_vectors(model: Any, mined: Any) -> Any:
    """One vector, added at one block, as a capsule with one site would be."""
    library = pytest.importorskip("steering_vectors", reason="pip install --no-deps steering-vectors")
    library.SteeringVector(vector(model)).patch_activations(model)
    return model


def repeng(model: Any, mined: Any) -> Any:
    """One vector at one block. It names numpy.float_, which numpy 2 took away."""
    import numpy

    if not hasattr(numpy, "float_"):
        numpy.float_ = numpy.float64
    library = pytest.importorskip("repeng", reason="pip install --no-deps repeng", exc_type=Exception)
    ((block, direction),) = vector(model).items()
    control = library.ControlVector(model.config.model_type, {block: direction.numpy()})
    library.ControlModel(model, [block]).set_control(control)
    return model


def vector(model: Any) -> dict[int, torch.Tensor]:
    """By block: a random direction, too short to change what is written."""
    block = len(decoder_blocks(model)) // 10
    direction = torch.randn(width(model), generator=torch.Generator().manual_seed(0))
    return {block: 1e-3 * direction / direction.norm()}


CONTENDERS = [bare, kif_one, kif_many, steering_vectors, repeng]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda f: f.__name__)
def test_generate(
    benchmark: Any, model_and_tokenizer: Any, mined: Any, capsys: Any, contender: Any, batch: int
) -> None:
    model, tokenizer = model_and_tokenizer
    try:
        other = contender(sharing(model), mined)
        generate(other, tokenizer, batch)
    except pytest.skip.Exception:
        raise
    except Exception as problem:  # a library of others that does not work here is a result too
        if contender in (bare, kif_one, kif_many):
            raise
        pytest.skip(f"{contender.__name__} does not work here: {type(problem).__name__}: {str(problem)[:200]}")
    if contender in (steering_vectors, repeng):
        assert not torch.equal(logits(other, tokenizer), logits(model, tokenizer)), "it changes nothing"
    generate(model, tokenizer, batch)
    before: list[Cost] = []
    own: list[Cost] = []
    benchmark.pedantic(
        lambda: own.append(generate(other, tokenizer, batch)),
        setup=lambda: before.append(generate(model, tokenizer, batch)),
        rounds=ROUNDS,
    )
    before.append(generate(model, tokenizer, batch))
    by_clock, by_processor = (ratios([c[i] for c in before], [c[i] for c in own]) for i in (0, 1))
    speed = batch * NEW_TOKENS / statistics.median(c[0] for c in own)
    benchmark.extra_info |= {"clock": by_clock, "processor": by_processor, "tokens_per_second": speed}
    with capsys.disabled():
        print(
            f"\n{contender.__name__:16} batch {batch}: {shown(by_clock)} of bare by the clock, "
            f"{shown(by_processor)} by processor time, {speed:.1f} tokens/s, {len(own)} rounds"
        )


def ratios(bare: list[float], own: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile of contender ÷ bare in tokens per second, each call between two."""
    return statistics.quantiles([(bare[i] + bare[i + 1]) / 2 / cost for i, cost in enumerate(own)], n=4)


def shown(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(**tokenizer(PROMPT, return_tensors="pt")).logits


def generate(model: Any, tokenizer: Any, batch: int) -> Cost:
    """What greedy generation of NEW_TOKENS tokens takes."""
    inputs = tokenizer([PROMPT] * batch, return_tensors="pt")
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    clock, processor = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
    return time.perf_counter() - clock, time.process_time() - processor
