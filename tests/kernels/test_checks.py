"""What the operators refuse before anything is launched, for every device ("meta" stands for one that is no CPU)."""

import pytest
import torch

from kif_kernels import (
    Candidates,
    KernelError,
    SiteTensors,
    add_norm_suppress_,
    checks,
    detect,
    suppress_,
    suppress_normed_,
)


def site_on(device: str, rank: int = 2) -> SiteTensors:
    return SiteTensors.empty(width=48, signatures=3, rank=rank, rows=2, set_length=3, device=device)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


ROWS = zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("x", "more", "message"),
    [
        (zeros(48, 4).T, {}, r"x has strides \[1, 4\]; on meta the last must be 1"),
        (zeros(4, 96)[:, ::2], {}, r"x has strides \[96, 2\]"),
        (zeros(4, 47), {}, r"x is \[4, 47\] but the site's detectors are 48 wide"),
        (zeros(4, 48), {"rows": torch.zeros(4, dtype=torch.int32)}, r"on cpu; expected torch.int32 \[4\] on meta"),
        (zeros(4, 48), {"rows": zeros(1, dtype=torch.int32).expand(4)}, r"rows has stride 0; on meta .* contiguous"),
        (zeros(4, 48), {"hits": torch.zeros(4, 3, dtype=torch.bool)}, "hits is on cpu"),
        (zeros(4, 48), {"hits": zeros(3, 4, dtype=torch.bool).T}, r"strides \[1, 4\]"),
        (zeros(4, 48), {"candidates": Candidates.empty(3, device="meta")}, r"candidates.count is .* \[3\] .*\[4\]"),
        (zeros(4, 48), {"candidates": Candidates.empty(4)}, "candidates.count is .* on cpu"),
        (zeros(4, 48), {"candidates": Candidates(zeros(8, dtype=torch.int32)[::2], ROWS[:, None])}, r"strides \[2\]"),
    ],
)
def test_suppress(x, more, message) -> None:
    with pytest.raises(KernelError, match=message) as caught:
        suppress_(x, **{"rows": ROWS, "site": site_on("meta")} | more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("op", [add_norm_suppress_, suppress_normed_])
@pytest.mark.parametrize(
    ("residual", "weight", "message"),
    [
        (zeros(48, 4).T, zeros(48), r"residual has strides \[1, 4\]"),
        (
            zeros(4, 48, dtype=torch.bfloat16),
            zeros(48),
            r"residual is torch.bfloat16 \[4, 48\] .*; expected torch.float32",
        ),
        (zeros(4, 48), zeros(96)[::2], "weight is not contiguous"),
        (zeros(4, 48), zeros(1, 48), r"weight is torch.float32 \[1, 48\]"),
    ],
)
def test_the_fused_operators(op, residual, weight, message) -> None:
    with pytest.raises(KernelError, match=message):
        op(zeros(4, 48), residual, ROWS, site_on("meta"), weight, 1e-5)


def test_detect() -> None:
    with pytest.raises(KernelError, match=r"residual is torch.float16"):
        detect(zeros(4, 48), ROWS, site_on("meta"), Candidates.empty(4, device="meta"), residual=zeros(4, 48).half())


@pytest.mark.parametrize(("rank", "message"), [(0, "rank 0"), (65, "rank 65, width 48: expected ranks 1 to 64")])
def test_ranks_out_of_reach(rank, message) -> None:
    with pytest.raises(KernelError, match=message):
        site_on("cpu", rank)


@pytest.mark.parametrize("row", [-2, 2])
def test_rows_out_of_range_are_found_when_asked_for(monkeypatch, row) -> None:
    monkeypatch.setattr(checks, "DEBUG", True)
    rows = torch.tensor([0, row, -1], dtype=torch.int32)
    with pytest.raises(KernelError, match="the site has capsule sets 0 to 1, and -1 for none"):
        suppress_(torch.zeros(3, 48), rows, site_on("cpu"))
    suppress_(torch.zeros(3, 48), rows.clamp(-1, 1), site_on("cpu"))


def test_columns_that_hits_lacks_are_found_when_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(checks, "DEBUG", True)
    site, x, rows = site_on("cpu"), torch.zeros(3, 48), torch.zeros(3, dtype=torch.int32)
    site.owner[1] = 2
    with pytest.raises(KernelError, match="hits has 2 columns; the site's capsules go to number 2"):
        suppress_(x, rows, site, torch.zeros(3, 2, dtype=torch.bool))
    suppress_(x, rows, site, torch.zeros(3, 3, dtype=torch.bool))
