"""Every symbol of vLLM that KIF touches exists in this version with the parameters that KIF expects."""

import ast
import inspect
from pathlib import Path

import pytest

import kif_vllm
from kif_vllm import coupling

pytestmark = pytest.mark.slow

ALL = (*coupling.WRAPPED, *coupling.INSTANCES, *coupling.USED)


@pytest.mark.parametrize("symbol", ALL, ids=lambda s: s.where)
def test_the_symbol_is_there_and_takes_what_is_expected(symbol):
    assert coupling.problems([symbol]) == []


def test_a_symbol_that_is_gone_or_changed_is_named():
    gone = coupling.Symbol("vllm.v1.engine.core:EngineCore.gone", "self", "")
    moved = coupling.Symbol("vllm.nowhere:x", None, "")
    changed = coupling.WRAPPED[0]._replace(parameters="self something")
    found = coupling.problems([gone, moved, changed])
    assert ["EngineCore.gone" in found[0], "vllm.nowhere" in found[1], "something" in found[2]] == [True] * 3
    with pytest.raises(RuntimeError, match=r"0\.32"):
        coupling.check([gone])


def test_vllms_warm_up_is_inside_what_is_taken_for_its_set_up():
    """After it a request without a frozen set stops the step; the warm-up sends such requests on a GPU."""
    set_up = coupling.resolve("vllm.v1.engine.core:EngineCore._initialize_kv_caches")[2]
    assert "compile_or_warm_up_model()" in inspect.getsource(set_up)


def test_only_listed_functions_can_be_wrapped():
    with pytest.raises(RuntimeError, match="table"):
        coupling.wrap("vllm.v1.engine.core:EngineCore.step", lambda inner, *args: inner(*args))


def test_installing_twice_wraps_once():
    from kif_vllm import hooks

    hooks.install()
    wrapped = coupling.resolve(coupling.WRAPPED[0].where)[2]
    hooks.install()
    assert coupling.resolve(coupling.WRAPPED[0].where)[2] is wrapped
    assert not hasattr(wrapped.kif_wraps, "kif_wraps")


def test_every_import_of_vllm_is_of_a_listed_module():
    """What the code imports from vllm, wherever it does, is in the table."""
    listed = {symbol.where.partition(":")[0] for symbol in ALL} | {"vllm"}
    found = set()
    for path in Path(kif_vllm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "vllm":
                found.add(node.module)
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "vllm"}
    assert found <= listed, found - listed
