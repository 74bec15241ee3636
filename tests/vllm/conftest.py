"""What the tests of the vLLM plugin share. Those that need vLLM itself are marked slow and run in .venv-vllm."""

import importlib.util

import pytest

HAVE_VLLM = importlib.util.find_spec("vllm") is not None
WHY_NOT = "vLLM is not importable here: run `make setup-vllm`, then `.venv-vllm/bin/python -m pytest tests/vllm`"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow") and not HAVE_VLLM and "tests/vllm" in str(item.path):
            item.add_marker(pytest.mark.skip(reason=WHY_NOT))


def pytest_terminal_summary(terminalreporter):
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if WHY_NOT in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} TESTS OF THE vLLM PLUGIN DID NOT RUN. {WHY_NOT}", red=True, bold=True)
