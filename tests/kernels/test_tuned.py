"""Configurations are data: what is shipped is complete, and what is measured can be read back."""

import json
import subprocess
import sys

import pytest
import torch

from kif_kernels import KernelError, tune, tuned

X = torch.zeros(1, 64)


@pytest.fixture
def fresh(monkeypatch):
    """fresh(path): tables as a new process would read them with KIF_TUNED=path."""

    def read(path: object) -> None:
        monkeypatch.setenv("KIF_TUNED", str(path))
        tuned._tables.cache_clear()
        tuned.table.cache_clear()

    yield read
    tuned._tables.cache_clear()
    tuned.table.cache_clear()


@pytest.mark.parametrize("width", [1, 64, 576, 4096, 5120, 8192])
@pytest.mark.parametrize("kernel", ["row", "backward"])
def test_every_width_has_a_configuration(width, kernel) -> None:
    config = tuned.row_config(kernel, width, 64, X)
    assert config["num_warps"] in (1, 2, 4, 8, 16, 32)
    assert 64 % config["BLOCK"] == 0
    assert tuned.row_config(kernel, width, 1, X)["BLOCK"] == 1


def test_wider_tokens_have_none() -> None:
    with pytest.raises(KernelError, match="no configuration for width 8193: the tables go to 8192"):
        tuned.row_config("row", tuned.WIDEST + 1, 64, X)


@pytest.mark.parametrize("tokens", [1, 12, 33, 8192])
@pytest.mark.parametrize("kernel", ["suppress", "detect"])
def test_every_number_of_tokens_has_a_tile(tokens, kernel) -> None:
    config = tuned.tile_config(kernel, tokens, X)
    assert min(config["BLOCK_N"], config["BLOCK_S"], config["BLOCK_D"]) >= 16  # what a tensor core takes at least
    assert config["PRECISION"] in ("tf32", "ieee")


def test_prefill_works_in_tiles_and_decoding_does_not() -> None:
    assert tuned.in_tiles(2048, 64, X)
    assert not tuned.in_tiles(12, 64, X)
    assert not tuned.in_tiles(2048, 1, X)


def test_the_cheapest_that_runs_is_chosen_and_read_back(fresh, tmp_path, monkeypatch) -> None:
    def cost(kernel: str, size: int, config: dict[str, int]) -> float:
        """8 warps are cheapest at 4096 wide, 16 elsewhere; 1 warp would be cheaper still but cannot run."""
        if config["num_warps"] == 1:
            return float("inf")
        return abs(config["num_warps"] - (8 if size == 4096 else 16)) + 1.0

    table = tune.new_table(cost, lambda line: None)
    monkeypatch.setattr(tuned, "architecture", lambda index: "sm_99")
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"sm_99": table}))
    fresh(path)
    on_gpu = tuned.table(torch.device("cuda", 0))
    assert [entry["num_warps"] for entry in on_gpu["row"]] == [16, 16, 16, 8, 16]
    assert on_gpu["row"][-1]["width"] == tuned.WIDEST
    assert on_gpu["detect"][-1]["tokens"] >= 1 << 31
    assert on_gpu["tiles_from"] == tuned.table(torch.device("cpu"))["tiles_from"]
    assert tuned.table(torch.device("cpu"))["row"] != on_gpu["row"]


def test_where_nothing_runs_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="no configuration runs"):
        tune.best([{"num_warps": 4}], lambda config: float("inf"))


def test_a_table_that_cannot_be_read_is_refused_in_one_line(fresh, tmp_path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "missing.json"):
        fresh(tmp_path / name)
        with pytest.raises(KernelError, match=f"KIF_TUNED=.*{name}") as caught:
            tuned.in_tiles(1, 1, X)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tuning_says_so_and_ends_with_2(tmp_path) -> None:
    command = [sys.executable, "-m", "kif_kernels.tune", "-o", str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("no GPU here")
    assert not done.stdout
    assert not (tmp_path / "x.json").exists()
