"""kif bench --serve: what it measures, and that it goes on where it stopped. Servers: tests/vllm."""

import csv
import json
import os
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kif_cli.benchmarks.serving import load, rounds, standins
from kif_cli.benchmarks.serving.cells import FIGURES, Cell, Grid, Table
from kif_cli.benchmarks.serving.servers import Server
from kif_hf import attach
from kif_runtime import KifError
from kif_runtime.mining.corpus import corpus
from kif_vllm.serve import Launch
from tests.mining import WIDTH

GRID = Grid(
    sizes=(0, 10), applied=("mandatory",), touched=(0, 25), concurrency=(2,), lengths=((40, 4),), adapter=(False,),
    requests=8, rounds=2,
)  # fmt: skip
CELL = Cell(10, "mandatory", 25, 2, 40, 4, False)
STANDS_ON = {"model": "m", "commit": "abc", "gpu": None}


def figures(speed):
    return dict.fromkeys(FIGURES, speed) | {"touched_seen": 25.0, "gate_share": 0.01}


# -- the grid and the table


def test_a_server_without_capsules_touches_nothing_and_is_started_once():
    both = replace(GRID, applied=("mandatory", "resident"))
    assert [(s.capsules, s.applied) for s in both.loads()] == [(0, "resident"), (10, "mandatory"), (10, "resident")]
    assert [c.touched for c in both.cells(both.loads()[0])] == [0]
    assert [c.touched for c in both.cells(both.loads()[1])] == [0, 25]


def test_ratios_are_taken_within_a_round():
    table = Table(None, STANDS_ON)
    for turn, (stock, kif) in enumerate([(100.0, 90.0), (10.0, 10.0), (50.0, 60.0)]):
        table.add(CELL, turn, {"stock": figures(stock), "kif": figures(kif)})
    (row,) = table.ratios()
    assert row["tokens_per_second"] == {"ratio": 1.0, "low": 0.9, "high": 1.2, "stock": 50.0}
    assert (row["capsules"], row["applied"], row["adapter"], row["rounds"]) == (10, "mandatory", False, 3)


def test_what_a_file_holds_is_not_measured_again_and_what_was_torn_off_is(tmp_path):
    path = tmp_path / "requests.csv"
    table = Table(path, STANDS_ON)
    for turn in range(2):
        table.add(CELL, turn, {"stock": figures(2.0), "kif": figures(1.0)})
    whole = path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert [row["commit"] for row in csv.DictReader(path.open())] == ["abc"] * 4
    again = Table(path, STANDS_ON)
    assert again.holds(CELL, 1) and not again.holds(CELL, 2) and not again.holds(replace(CELL, touched=0), 1)
    for kept in (whole[: len(whole) - 9], whole[: whole.rstrip().rfind("\n") + 1]):  # half a row, half a pair
        path.write_text(kept)
        torn = Table(path, STANDS_ON)
        assert torn.holds(CELL, 0) and not torn.holds(CELL, 1)
        torn.add(CELL, 1, {"stock": figures(2.0), "kif": figures(1.0)})
        assert path.read_text() == whole


def test_figures_that_stand_on_something_else_are_not_mixed(tmp_path):
    Table(tmp_path / "t.csv", STANDS_ON).add(CELL, 0, {"stock": figures(2.0), "kif": figures(1.0)})
    with pytest.raises(KifError, match="another commit"):
        Table(tmp_path / "t.csv", STANDS_ON | {"commit": "def"})


def test_figures_of_an_unclean_tree_are_not_added_to(tmp_path):
    for clean, path in ((True, tmp_path / "a.csv"), (None, tmp_path / "b.csv"), (False, tmp_path / "c.csv")):
        Table(path, STANDS_ON | {"clean_tree": clean}).add(CELL, 0, {"stock": figures(2.0), "kif": figures(1.0)})
        if clean is not False:
            assert Table(path, STANDS_ON | {"clean_tree": clean}).holds(CELL, 0)
    with pytest.raises(KifError, match="unclean tree"):
        Table(path, STANDS_ON | {"clean_tree": False})


def test_figures_of_other_capsules_are_not_added_to(capsule, tmp_path, monkeypatch):
    class Opened(Exception):
        pass

    def opened(*_, **__):
        raise Opened

    stands_on = []
    monkeypatch.setattr(rounds, "Table", lambda path, on: stands_on.append(on) or Table(None, on))
    monkeypatch.setattr(rounds, "open_model", opened)  # it would measure from here on
    for name, changes in (("a", {}), ("b", {}), ("c", {"provenance": {"kif": "other"}})):
        (tmp_path / name).mkdir()
        replace(capsule, **changes).save(tmp_path / name / "x.kif.safetensors")
        with pytest.raises(Opened):
            rounds.measured("m", GRID, tmp_path / name, None, (), None, lambda *_: None)
    assert stands_on[0] == stands_on[1]
    assert {key for key in stands_on[0] if stands_on[0][key] != stands_on[2][key]} == {"capsules_digest"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "--serve", "m"), "one at a time"),
        (("--serve", "m", "--against", "dense"), "stock vLLM"),
        (("--serve", "m", "--touched", "1,101"), "no"),
        (("--serve", "m", "--lengths", "64"), "--lengths '64'"),
        (("--serve", "m", "--lengths", "64:1"), "at least 1:2"),
        (("--serve", "m", "--sizes", "-1"), "--sizes '-1'"),
        (("--serve", "m", "--", "--additional-config", "{}"), "leave it out"),
        (("--serve", "m", "--adapter", "nowhere"), "nowhere holds no LoRA adapter"),
        (("--", "--enforce-eager"), "no --serve"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(refused, arguments, said):
    assert said in refused("bench", *arguments)


# -- requests and what they touch


def letters():
    """A tokenizer with a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def test_the_asked_share_of_all_requests_is_touched_and_prompts_are_not_sent_twice():
    ground = standins.Ground("f" * 64, WIDTH, 4, {}, 500, 250, None)
    for percent, expected in ((0, 0), (25, 4), (100, 16)):
        cell = replace(CELL, touched=percent)
        prompts = [r["prompt"] for turn in range(2) for r in rounds._requests(GRID, cell, turn, ground)]
        assert sum(250 in p for p in prompts) == expected
        assert len({tuple(p) for p in prompts}) == len(prompts) == 16
        assert all(len(p) == 40 and min(p) >= 0 and max(p) < 500 for p in prompts)
    named = rounds._requests(GRID, replace(CELL, applied="resident"), 0, ground)
    assert ["vllm_xargs" in r for r in named] == [True, False, False, False] * 2


def test_the_trigger_fires_on_its_token_and_random_capsules_do_not(tiny_model, monkeypatch):
    monkeypatch.setattr(standins, "PASSAGES", 3000)
    sizes = {"vocab_size": 512, "hidden_size": WIDTH, "head_dim": 16, "max_position_embeddings": 4096}
    model = tiny_model("llama", initializer_range=0.1, **sizes)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5, generator=torch.Generator().manual_seed(1))
    ground = standins.ground(model, letters())
    capsules = list(standins.drawn(ground, 20))
    for capsule in (ground.trigger, *capsules):
        capsule.validate()
        capsule.check_model(model)
    assert {s.rank for s in capsules[0].signatures} == {1, 2}
    assert len({c.digest for c in capsules}) == 20
    rng = torch.Generator().manual_seed(2)
    with attach(model, [ground.trigger, *capsules]) as kif, torch.no_grad():
        model(torch.tensor([standins.prompt(rng, 64, ground, touched=True) for _ in range(4)]))
        assert min(kif.fired_rows[standins.TRIGGER]) >= 2
        kif.reset()
        model(torch.tensor([standins.prompt(rng, 64, ground, touched=False) for _ in range(4)]))
        assert kif.fired[standins.TRIGGER] <= 4  # of 256
        kif.reset()
        ids = letters()(corpus().passages[0], return_tensors="pt").input_ids
        model(ids)
        assert sum(kif.fired.values()) <= 1e-3 * ids.numel() * len(capsules)


# -- times


class Slow(BaseHTTPRequestHandler):
    """Answers as vLLM streams: the first token after 80 ms, another every 20 ms."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("connection", "close")
        self.end_headers()
        for number in range(asked["max_tokens"]):
            time.sleep(0.02 if number else 0.08)
            self.event({"choices": [{"text": "x"}]})
        self.event({"choices": [], "usage": {"completion_tokens": asked["max_tokens"]}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content):
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *args):
        pass


def test_times_are_those_of_the_server_and_requests_run_as_many_at_a_time_as_asked():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = load.measured("127.0.0.1", server.server_port, [{"max_tokens": 6}] * 8, 4, 6)
        assert 0.08 <= found["ttft_p50"] <= found["ttft_p99"]
        assert 0.02 <= found["itl_p50"] <= found["itl_p99"]
        assert found["seconds"] >= 2 * 0.18
        assert found["tokens_per_second"] == pytest.approx(48 / found["seconds"])
        assert found["seconds"] < 8 * 0.18 or found["ttft_p50"] > 0.16  # but for a machine that is very busy
        with pytest.raises(KifError, match="6 tokens in 6 pieces where 7"):
            load.measured("127.0.0.1", server.server_port, [{"max_tokens": 6}], 1, 7)
    finally:
        server.shutdown()
    server.server_close()
    with pytest.raises(KifError, match="did not answer"):
        load.measured("127.0.0.1", server.server_port, [{"max_tokens": 6}], 1, 6)


def test_quantiles_are_those_of_numpy():
    values = torch.rand(257, generator=torch.Generator().manual_seed(0)).tolist()
    for share in (0.5, 0.9, 0.99, 1.0):
        assert load.quantile(values, share) == numpy.quantile(values, share, method="inverted_cdf")


def test_the_cpu_seconds_of_a_server_are_those_of_its_process_group(tmp_path):
    """A stand-in for a server, whose child burns a known time and tells it."""
    child = "import time\nwhile time.process_time() < 0.5: pass\nprint(time.process_time(), flush=True)\ntime.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    server = Server(Launch([sys.executable, "-c", parent, "--"], dict(os.environ)), tmp_path / "log")
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "log").read_text().endswith("\n") and time.monotonic() < end:
            time.sleep(0.05)
        burnt = float((tmp_path / "log").read_text())
        assert burnt <= server.cpu_seconds() + 0.02 < burnt + 2.0  # the parent's start comes on top
    finally:
        server.__exit__()
