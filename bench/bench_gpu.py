"""The fused operator on a GPU, by pytest-benchmark; `kif bench --gpu` gives the whole table with its peers.

pytest bench/bench_gpu.py
"""

import pytest
import torch

from kif_cli.benchmarks import cases, gpu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: nothing is measured")


@pytest.mark.parametrize("signatures", gpu.SIGNATURES)
@pytest.mark.parametrize("tokens", gpu.TOKENS)
def test_add_norm_suppress(benchmark, tokens: int, signatures: int) -> None:
    case = cases.case(tokens, 4096, signatures, False, "cuda")
    cases.check(case)

    def call() -> None:
        cases.kif(case)
        torch.cuda.synchronize()

    benchmark(call)
