"""kif bench --serve with real servers, on a small grid."""

import csv
import json
import xml.etree.ElementTree as Tree

import pytest
from typer.testing import CliRunner

from kif_cli.main import app

pytestmark = pytest.mark.slow


def test_two_servers_are_measured_beside_each_other_and_a_second_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("kif_cli.benchmarks.measuring._checkout", lambda: ("abc", True))  # clean
    arguments = (
        "bench", "--serve", "embedded", "--sizes", "0,3", "--touched", "0,50", "--requests", "4", "--rounds", "1",
        "--concurrency", "2", "--lengths", "32:4", "--json", "-o", str(tmp_path), "--", "--enforce-eager",
    )  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["serving"]
    assert [(r["capsules"], r["touched"], r["touched_seen"]) for r in rows] == [(0, 0, 0), (3, 0, 0), (3, 50, 50)]
    assert [0 < r["gate_share"] < 1 for r in rows] == [False, True, True]  # with no capsule there is no gate
    assert rows[0]["gate_share"] == 0
    assert all(r[name]["ratio"] > 0.1 for r in rows for name in ("tokens_per_second", "ttft_p50", "itl_p99"))
    written = (tmp_path / "requests.csv").read_text()
    assert len(list(csv.DictReader(written.splitlines()))) == 2 * 3
    assert Tree.fromstring((tmp_path / "serving-itl_p50.svg").read_text()).tag.endswith("svg")
    assert CliRunner().invoke(app, arguments).exit_code == 0  # everything is there: no server is started
    assert (tmp_path / "requests.csv").read_text() == written
