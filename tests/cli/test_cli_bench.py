"""kif bench: what it refuses, what its rows hold, and that it prints no figure where it could not measure."""

import inspect
import json
import xml.etree.ElementTree as Tree

import pytest
import torch

from kif_cli.benchmarks import cases, charts, gpu, measuring, record
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
    case = cases.case(150, 256, signatures, firing, "cpu")
    assert (case.candidates is not None) == (signatures > 64)
    cases.check(case)
    before = (case.hidden.float() + case.residual.float()).bfloat16()
    cases.kif(case)
    changed = (case.residual != before).any(1)
    assert case.firing == (2 if firing and signatures else 0)
    assert changed.nonzero().flatten().tolist() == ([0, 100] if case.firing else [])


def test_a_kernel_that_differs_is_not_timed(monkeypatch):
    case = cases.case(150, 256, 1, True, "cpu")
    monkeypatch.setattr(cases, "kif", cases.eager)  # suppresses nothing
    with pytest.raises(KifError, match="nothing was measured"):
        cases.check(case)


@pytest.fixture
def on_cpu(monkeypatch):
    """`kif bench --gpu` as on a GPU, but on CPU tensors and by a clock that stands still; counts what was timed."""
    timed = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(gpu, "case", lambda *shape: cases.case(*shape[:-1], "cpu"))
    monkeypatch.setattr(gpu, "timed", lambda call, rounds: (timed.append(call), call()) and (1e-6, 2e-6, 4e-6))
    monkeypatch.setattr(gpu, "launches", lambda call: 1)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda: 4e9)
    monkeypatch.setattr(gpu, "TOKENS", (1, 8))
    monkeypatch.setattr(gpu, "SIGNATURES", (0, 1, 100))
    return timed


def test_on_a_gpu_every_contender_gets_a_row_for_each_shape_it_depends_on(on_cpu, tmp_path):
    results, plots = gpu.measured(tmp_path, [64], (), 1)
    found = results["gpu"]
    assert [r["why_not"] for r in found if r["what"] in ("kif", "eager", "compile", "add", "copy", "dense")] == (
        [None] * (10 + 2 * 4 + 6)
    )
    assert {r["what"] for r in found if r["signatures"]} == {"kif", "dense"}
    one = next(r for r in found if r["what"] == "kif" and r["tokens"] == 8)
    assert (one["p20"], one["p50"], one["p80"], one["launches"]) == (1e-6, 2e-6, 4e-6, 1)
    assert one["bytes_per_second"] == pytest.approx(4 * 8 * 64 * 2 / 2e-6)  # hidden and residual, read and written
    assert one["of_copy_bandwidth"] == pytest.approx(one["bytes_per_second"] / 4e9)
    assert next(r for r in found if r["what"] == "add" and r["tokens"] == 8)["bytes_per_second"] == pytest.approx(
        one["bytes_per_second"] / 2
    )
    assert Tree.fromstring(plots["gpu-64"]).tag.endswith("svg")


def test_a_peer_that_fails_is_a_row_that_says_why(on_cpu, monkeypatch):
    def broken(case):
        raise TypeError("fused_add_rms_norm() takes 5 positional arguments")

    monkeypatch.setitem(gpu.PEERS, "liger", cases.Peer(broken))
    found = [r for r in gpu.measured(None, [64], ("liger",), 1)[0]["gpu"] if r["what"] == "liger"]
    assert [r["why_not"] for r in found] == ["TypeError: fused_add_rms_norm() takes 5 positional arguments"] * 2
    assert all(r["p50"] is None and r["of_copy_bandwidth"] is None and r["launches"] is None for r in found)


def test_a_failure_of_kif_itself_ends_the_measurement(on_cpu, monkeypatch):
    monkeypatch.setattr(cases, "add_norm_suppress_", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu.measured(None, [64], ("eager",), 1)


def test_what_was_measured_is_on_disk_and_not_measured_again(on_cpu, tmp_path, monkeypatch):
    """The second contender of the second shape is cut off."""
    monkeypatch.setattr(measuring, "_checkout", lambda: ("abc", True))
    full = gpu.measured(None, [64], ("eager", "dense"), 1)[0]
    whole, clock = len(on_cpu), gpu.timed
    on_cpu.clear()

    def cut(call, rounds):
        if len(on_cpu) == 4:
            raise KeyboardInterrupt
        return clock(call, rounds)

    monkeypatch.setattr(gpu, "timed", cut)
    with pytest.raises(KeyboardInterrupt):
        gpu.measured(tmp_path, [64], ("eager", "dense"), 1)
    assert len(json.loads((tmp_path / "results.json").read_text())["gpu"]) == 4
    monkeypatch.setattr(gpu, "timed", clock)
    on_cpu.clear()
    again = gpu.measured(tmp_path, [64], ("eager", "dense"), 1)[0]
    assert len(on_cpu) == whole - 4
    assert again["gpu"] == full["gpu"]
    assert json.loads((tmp_path / "results.json").read_text()) == again


@pytest.mark.parametrize(
    ("checkout", "asked", "kept"),
    [
        (("abc", True), {"rounds": 7}, True),
        ((None, None), {"rounds": 7}, True),  # an installed package
        (("abc", True), {"rounds": 8}, False),
        (("abd", True), {"rounds": 7}, False),
        (("abc", False), {"rounds": 7}, False),  # the code may have changed since
    ],
)
def test_rows_are_taken_up_only_where_they_would_come_out_the_same(tmp_path, monkeypatch, checkout, asked, kept):
    first = checkout if kept or checkout == ("abc", False) else ("abc", True)
    monkeypatch.setattr(measuring, "_checkout", lambda: first)
    record.Record(tmp_path, {"rounds": 7}).add("growth", [{"stage": "decode", "signatures": 3}])
    monkeypatch.setattr(measuring, "_checkout", lambda: checkout)
    again = record.Record(tmp_path, asked)
    assert again.rows("growth", stage="decode", signatures=3) == (
        [{"stage": "decode", "signatures": 3}] if kept else []
    )
    assert again.rows("growth", stage="decode", signatures=4) == []


@pytest.mark.parametrize("content", ["{", "[1]", "{}", "\0"])
def test_a_file_that_is_no_record_is_begun_anew(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    assert record.Record(tmp_path, {}).results.keys() == {"circumstances"}


@pytest.mark.filterwarnings("error")
def test_the_clock_and_the_peers_are_called_as_they_are_declared():
    """Against the signatures of what is installed; Liger's and vLLM's are checked where they are."""
    testing = pytest.importorskip("triton.testing")
    inspect.signature(testing.do_bench).bind(lambda: None, rep=20, quantiles=gpu.QUANTILES)
    assert torch.autograd.DeviceType.CUDA
    assert torch.profiler.ProfilerActivity.CUDA


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
    shapes = 2  # a prefill and a decoding step, each written as soon as it is measured
    assert [(r["signatures"], r["what"]) for r in rows] == [
        (size, what) for size in (1, 300) for _ in range(shapes) for what in ("kif", "dense")
    ]
    assert all(0 < r["low"] <= r["share"] <= r["high"] and r["seconds"] > 0 for r in rows)
    assert json.loads((tmp_path / "results.json").read_text())["growth"] == rows
    assert Tree.fromstring((tmp_path / "growth.svg").read_text()).tag.endswith("svg")
