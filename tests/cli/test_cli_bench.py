"""kif bench: what it refuses, what its rows hold, and that it prints no figure where it could not measure."""

import json
import xml.etree.ElementTree as Tree

import pytest
import torch

from kif_cli.benchmarks import charts, gpu, measuring
from kif_runtime import KifError

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@NO_GPU
def test_without_a_gpu_it_says_so_and_prints_no_figure(kif, tmp_path):
    result = kif("bench", "--gpu", "--json", "-o", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "no GPU" in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "--compiled"), "one at a time"),
        (("--gpu", "--against", "magic"), "'magic' is not among vllm, liger, eager, compile, add, copy, dense"),
        (("--against", "vllm"), "'vllm' is not among dense, add, copy"),
        (("--compiled", "--against", "dense"), "--compiled takes none"),
        (("--sizes", "1,ten"), "--sizes '1,ten'"),
        (("--gpu", "--widths", "0"), "--widths '0'"),
        (("--capsules", "nowhere"), "holds no capsules"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(refused, arguments, said):
    assert said in refused("bench", *arguments)


@pytest.mark.parametrize("signatures", [0, 1, 100])
@pytest.mark.parametrize("firing", [False, True])
def test_cases_for_the_gpu_fire_where_they_say(signatures, firing):
    """On the CPU, whose path must give what the specification gives, too."""
    case = gpu.case(150, 256, signatures, firing, "cpu")
    assert (case.candidates is not None) == (signatures > 64)
    gpu.check(case)
    before = (case.hidden.float() + case.residual.float()).bfloat16()
    gpu.kif(case)
    changed = (case.residual != before).any(1)
    assert case.firing == (2 if firing and signatures else 0)
    assert changed.nonzero().flatten().tolist() == ([0, 100] if case.firing else [])


def test_a_kernel_that_differs_is_not_timed(monkeypatch):
    case = gpu.case(150, 256, 1, True, "cpu")
    monkeypatch.setattr(gpu, "kif", gpu.eager)  # suppresses nothing
    with pytest.raises(KifError, match="nothing was measured"):
        gpu.check(case)


def test_a_row_says_what_it_stands_on():
    shape = {"tokens": 8, "width": 256, "signatures": 1, "firing": 0}
    found = gpu.row(shape, "kif", (1e-6, 2e-6, 4e-6), 1, least=4000, bandwidth=4e9)
    assert found == shape | {
        "what": "kif", "p20": 1e-6, "p50": 2e-6, "p80": 4e-6, "launches": 1, "why_not": None,
        "bytes_per_second": pytest.approx(2e9), "of_copy_bandwidth": pytest.approx(0.5),
    }  # fmt: skip
    failed = gpu.row(shape, "vllm", None, None, 4000, 4e9, why_not="ImportError: no vllm")
    assert failed.keys() == found.keys()
    assert [failed[name] for name in ("p20", "p50", "p80", "bytes_per_second", "launches")] == [None] * 5


def test_circumstances_name_machine_versions_commit_and_tree():
    found = measuring.circumstances()
    assert found["torch"] == torch.__version__
    assert {"gpu", "triton", "commit", "clean_tree", "threads", "cores"} <= found.keys()


def test_each_contender_is_compared_with_its_neighbours_in_time(monkeypatch):
    """The machine becomes twice as slow between rounds; shares stay what they are."""
    clock = iter([1, 3, 1, 1, 1, 2, 6, 2, 2, 2, 4, 12, 4, 4, 4])  # base, slow, base, even, base, per round
    monkeypatch.setattr(measuring, "timed", lambda call: next(clock))
    found = measuring.interleaved(lambda: None, {"slow": lambda: None, "even": lambda: None}, rounds=2)
    assert found["slow"]["share"] == 3
    assert found["even"] == {"share": 1, "low": 1, "high": 1, "seconds": 3}


def test_plots_are_sound_svg_with_every_point():
    plot = charts.curves("a < b", "x", "y", {"one": [(1, 0.01), (10, 0.1), (100, 0)], "two": [(1, 5)]}, limit=0.05)
    tags = [element.tag.rpartition("}")[2] for element in Tree.fromstring(plot).iter()]
    assert (tags.count("polyline"), tags.count("circle")) == (2, 3)  # 0 has no logarithm
    bars = Tree.fromstring(charts.bars("t", {"a": 1.0, "b": 4.0}, "u"))
    widths = [float(e.get("width")) for e in bars.iter() if e.tag.endswith("rect") and e.get("x")]
    assert widths[1] == pytest.approx(4 * widths[0], rel=0.01)


@pytest.mark.slow
def test_on_the_cpu_it_gives_shares_of_the_forward_and_a_plot(kif, tmp_path):
    result = kif("bench", "--sizes", "1,300", "--rounds", "1", "--json", "-o", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["growth"]
    assert [(r["signatures"], r["what"]) for r in rows[:4]] == [(1, "kif"), (1, "dense"), (300, "kif"), (300, "dense")]
    assert all(0 < r["low"] <= r["share"] <= r["high"] and r["seconds"] > 0 for r in rows)
    assert json.loads((tmp_path / "results.json").read_text())["growth"] == rows
    assert Tree.fromstring((tmp_path / "growth.svg").read_text()).tag.endswith("svg")
