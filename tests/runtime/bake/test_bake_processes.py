"""Bakings in processes of their own: killed and resumed, and two that train together."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.runtime.bake.conftest import NAME

SCRIPT = Path(__file__).parent / "running.py"
WEIGHTS = "adapter_model.safetensors"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """The tiny model, its tokenizer and its capsule on disk; in `whole`, a baking that nobody disturbed."""
    path = tmp_path_factory.mktemp("model")
    tiny.model.save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)
    tiny.capsule.save(path / "one.kif.safetensors")
    assert run(path, path / "whole").returncode == 0
    return path


def run(folder, out, *launcher):
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), str(out)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize("after", ["1", "4"])
def test_killed_and_run_again_is_bitwise_the_same(folder, tmp_path, after):
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), str(folder), str(out)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.strip() == after:
                process.send_signal(signal.SIGKILL)
                break
    assert process.wait() == -signal.SIGKILL
    assert not (out / WEIGHTS).exists()
    assert run(folder, out).returncode == 0
    assert (out / WEIGHTS).read_bytes() == (folder / "whole" / WEIGHTS).read_bytes()
    assert not (out / "checkpoint.safetensors").exists()


@pytest.mark.slow
def test_two_processes_train_as_one_does(folder, tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
    result = run(folder, tmp_path / "two", *launcher)
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = load_file(folder / "whole" / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
    moved = max(float(t.abs().max()) for n, t in one.items() if "lora_B" in n)  # it began at 0
    apart = max(float((one[n] - two[n]).abs().max()) for n in one)
    assert moved > 1e-4
    # sums of the same gradients in another order; AdamW divides by their size, so a bound relative to what was learned
    assert apart < 1e-2 * moved
    assert NAME.encode() not in (tmp_path / "two" / "training.jsonl").read_bytes()
