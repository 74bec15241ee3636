"""The gate for compiled kernels: on every target, what ships has no spills and moves rows 128 bits at a time."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton, which has no build for this machine", allow_module_level=True)

from kif_kernels import SiteTensors, tuned
from kif_kernels.suppress import triton as suppress
from kif_kernels.targets import GPUS, Build, Launch, Traffic, build, failures, fusion, rows, shipped, traffic
from kif_kernels.targets.launches import recorded, standing_in

WIDTH, OTHERS = 4096, (512, 576, 2048, 8192)  # 576 is configured as 1024, 5120 as 8192
KERNELS = {
    name
    for op in ("suppress.triton", "suppress.triton_backward", "add_norm_suppress.triton", "detect.triton")
    for name in vars(import_module(f"kif_kernels.{op}"))
    if name.endswith("_kernel")
}
# The launches that take most registers: wherever a configuration was wrong, one of these spilt.
TIGHT = ("add_norm_suppress, candidates", "suppress, tiles", "suppress, gradient")


@pytest.fixture(scope="module")
def builds() -> Iterator[dict[str, list[Build]]]:
    """Everything that ships, on every target."""
    yield {name: [build(launch, gpu) for launch in shipped(gpu, WIDTH)] for name, gpu in GPUS.items()}


def fused(name: str, width: int) -> Launch:
    return next(x for x in shipped(GPUS[name], width) if x.name == "add_norm_suppress")


@pytest.mark.slow
@pytest.mark.parametrize("target", GPUS)
def test_what_ships_passes_the_gate(builds, target) -> None:
    assert {b.launch.kernel.__name__ for b in builds[target]} == KERNELS
    assert failures(builds[target]) == []


def tight(target: str, width: int) -> list[Launch]:
    return [launch for launch in shipped(GPUS[target], width) if launch.name in TIGHT]


@pytest.mark.slow
@pytest.mark.parametrize("width", OTHERS)
@pytest.mark.parametrize("target", GPUS)
def test_what_takes_most_registers_passes_at_other_widths(target, width) -> None:
    """`kif bench --compiled` compiles all else, too, in some minutes."""
    assert len(tight(target, width)) == len(TIGHT)
    assert failures([build(launch, GPUS[target]) for launch in tight(target, width)]) == []


@pytest.mark.parametrize("target", GPUS)
def test_every_configuration_that_ships_is_among_what_is_compiled(target) -> None:
    launches = shipped(GPUS[target], WIDTH) + [launch for width in OTHERS for launch in tight(target, width)]
    kernels = {"row": "suppress", "backward": "gradient", "suppress": "tiles", "detect": "detect"}
    with standing_in(GPUS[target]):
        table = tuned.table(torch.device("cpu"))
    for kernel, name in kernels.items():
        met = [launch.options for launch in launches if name in launch.name]
        for entry in table[kernel]:
            config = {k: v for k, v in entry.items() if k not in ("width", "tokens")}
            assert any(config.items() <= options.items() for options in met), (kernel, entry)


@pytest.mark.slow
def test_an_access_to_a_row_moves_just_that_row(builds) -> None:
    """What the machine code says adds up: instructions × their width × threads are D numbers of bf16 at every line."""
    for built in (b for found in builds.values() for b in found if b.launch.name == "add_norm_suppress"):
        own = [a for a in built.accesses if a.of_row and a.file.endswith("add_norm_suppress/triton.py")]
        assert {a.kind for a in own} == {"load", "store"}
        assert len({(a.kind, a.line) for a in own}) == len(own) >= 4
        for access in own:
            assert access.count * access.bits // 8 * built.warps * built.gpu.lanes == WIDTH * 2


@pytest.mark.slow
def test_rows_of_the_report_and_the_gain_of_fusion(builds) -> None:
    found = rows(builds["sm_80"] + builds["gfx942"])
    assert all(r["registers"] > 0 and 0 < r["occupancy"] <= 1 and r["seconds"] > 0 for r in found)
    assert {"ttir", "ttgir", "llir", "ptx", "cubin"} < found[0]["passes"].keys()
    assert {"ttir", "ttgir", "llir", "amdgcn", "hsaco"} < found[-1]["passes"].keys()
    built = next(b for b in builds["sm_90"] if b.launch.name == "add_norm_suppress, one capsule")
    counted = Traffic(WIDTH, 1, rows=32768.0, shared=0.0, cached=0.0, least=32768.0)
    assert fusion(built, counted, 1)["gain"] == pytest.approx(4, rel=0.05)  # one token: 4 launches or 1
    assert fusion(built, counted, 10**9)["gain"] == pytest.approx(2, rel=0.05)  # very many: 8 moves of a row or 4
    assert fusion(built, counted, 1)["efficiency"] == pytest.approx(4 / built.seconds, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "width"), [("sm_90", 4096), ("gfx942", 8192)])
def test_a_configuration_with_too_few_warps_fails(target, width) -> None:
    bad = build(fused(target, width).changed(num_warps=1), GPUS[target])
    assert any("spills" in line for line in failures([bad]))


@pytest.mark.slow
def test_a_tile_too_small_for_wide_accesses_fails() -> None:
    tiles = next(x for x in shipped(GPUS["gfx942"], WIDTH) if x.name == "suppress, tiles")
    found = failures([build(tiles.changed(BLOCK_D=64), GPUS["gfx942"])])
    assert any("loads of 64 bits" in line and "triton_screen.py" in line for line in found)


@pytest.mark.slow
def test_rows_that_are_not_aligned_fail() -> None:
    x = torch.zeros(8, WIDTH + 1, dtype=torch.bfloat16)[:, 1:]
    site = SiteTensors.empty(width=WIDTH, signatures=64, rank=2, rows=1, set_length=64, dtype=torch.bfloat16)
    with standing_in(GPUS["sm_90"]), recorded() as launches:
        suppress.suppress_(x, torch.zeros(8, dtype=torch.int32), site, None, None)
    found = failures([build(Launch("suppress, odd rows", WIDTH, *launches[0]), GPUS["sm_90"])])
    assert any("16 bits" in line and "suppress/triton.py" in line for line in found)


@pytest.mark.slow
@pytest.mark.parametrize("width", [576, 4096])
def test_one_capsule_moves_hardly_more_than_has_to_be_moved(width) -> None:
    counted = traffic(width, 1)
    assert counted.least == 4 * width * 2
    assert 1.0 <= counted.ratio <= 1.02
    assert failures([], [counted]) == []
    assert counted.cached > 2 * width  # each token reads the detector again


def test_a_kernel_that_reads_a_row_twice_fails() -> None:
    once = Traffic(576, 1, rows=4608.0, shared=31.0, cached=0.0, least=4608.0)
    assert failures([], [once]) == []
    assert "1.257 times" in failures([], [replace(once, rows=5760.0)])[0]


def test_occupancy_is_what_the_vendors_calculators_give() -> None:
    """By hand from their tables: 65,536 registers and 64 warps a multiprocessor; 512 registers and 8 waves a SIMD."""
    h100, mi300 = GPUS["sm_90"], GPUS["gfx942"]
    assert h100.occupancy(32, 0, 8) == 1.0
    assert h100.occupancy(128, 8192, 8) == 0.25
    assert h100.occupancy(33, 0, 4) == 0.75  # 40 a thread after rounding up: 51 warps, in programs of 4
    assert h100.occupancy(32, 100 << 10, 8) == 0.25  # shared memory for two programs
    assert mi300.occupancy(64, 0, 4) == 1.0
    assert mi300.occupancy(99, 0, 4) == 0.5  # 104 after rounding up: 4 waves on each SIMD
