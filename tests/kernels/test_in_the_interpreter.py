"""The Triton kernels run in Triton's interpreter.

It has to be chosen before triton is imported, hence a process of their own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "interpreter"


def run(chosen: str) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.fail("triton is missing: run make setup-dev")
    command = [sys.executable, "-m", "pytest", str(HERE), "-m", chosen, "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "0"}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[2], capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.fail(done.stdout[-8000:] + done.stderr[-2000:], pytrace=False)
    assert " passed" in done.stdout


@pytest.mark.slow  # half a minute
def test_kernels() -> None:
    run("not slow")


@pytest.mark.slow
def test_kernels_at_every_size_and_dtype() -> None:
    run("slow")
