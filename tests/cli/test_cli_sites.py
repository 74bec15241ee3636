"""kif sites, around a stand-in for the validation, which has tests of its own."""

import pytest

from kif_runtime import MiningError, mining
from kif_runtime.mining import SiteScore


@pytest.fixture
def validating(monkeypatch):
    asked = []

    def validate_sites(model, tokenizer, sites, *, steps, progress):
        asked.append((sites, steps))
        if sites == [9]:
            raise MiningError("site 9 is not a block of this model; choose 0 to 3")
        progress(1, 2, "validating sites")
        return [SiteScore(0, 1.0, 0.5, 0.25, 1.0), SiteScore(2, 1.0, 0.25, 0.125, 0.98)]

    monkeypatch.setattr(mining, "validate_sites", validate_sites)
    return asked


def test_each_site_has_its_row_and_the_best_is_named(kif, tiny, validating):
    result = kif("sites", "-m", tiny.folder)
    assert result.exit_code == 0 and validating == [(None, 60)]
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[1] == ["0", "50%", "0.500", "0.250", "0.750", "100.0%"]
    assert rows[2] == ["2", "25%", "0.250", "0.125", "0.375", "98.0%"]
    assert result.stdout.splitlines()[-1] == "best: kif mine --site 2"
    assert "validating sites: 1 of 2" in result.stderr


def test_as_json_it_says_the_same(kif, tiny, validating):
    found = kif("sites", "-m", tiny.folder, "--site", "0", "--site", "2", "--steps", "3", "--json").json
    assert validating == [([0, 2], 3)]
    assert found["best"] == 2
    assert found["sites"][0] == {
        "site": 0,
        "before": 1.0,
        "left": 0.5,
        "harm": 0.25,
        "recall": 1.0,
        "kept": 0.5,
        "loss": 0.75,
    }


def test_a_block_that_is_not_there_is_refused_in_one_line(kif, tiny, validating):
    result = kif("sites", "-m", tiny.folder, "--site", "9")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1] == "kif: site 9 is not a block of this model; choose 0 to 3"
