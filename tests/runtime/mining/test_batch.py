"""Many subjects from one file: an error per line, and a batch that goes on where it stopped."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kif_runtime import Capsule, MiningError, mine
from kif_runtime.mining import mine_batch
from tests.mining import DAY, OWN


@pytest.fixture
def batch(tiny, tmp_path):
    """batch(lines, **options): mines them into the same folder each time."""
    folder = tmp_path / "capsules"

    def run(lines, **options):
        requests = tmp_path / "requests.jsonl"
        told = (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
        requests.write_text("\n".join(told), encoding="utf-8")
        return mine_batch(tiny.model, tiny.tokenizer, requests, folder, **{"steps": 0} | options)

    return SimpleNamespace(run=run, folder=folder, names=lambda: sorted(p.name for p in folder.iterdir()))


def test_every_line_becomes_the_capsule_that_mine_gives(tiny, batch, tmp_path):
    lines = [
        {"name": "Rome", "kind": "place", "aliases": ["Roma"], "controls": list("abcdefgh"), "prompts": OWN},
        "",
        {"name": "Ann Lee", "id": "a1", "private": True, "aliases": None},
    ]
    report = batch.run(lines, date=DAY)
    assert (report.done, report.skipped, report.failed) == ([1, 3], [], [])
    assert batch.names() == ["a1.kif.safetensors", "rome.kif.safetensors"]
    alone = mine(tiny.model, tiny.tokenizer, **lines[0], date=DAY, steps=0)
    assert Capsule.load(batch.folder / "rome.kif.safetensors", tiny.model).digest == alone.digest


def test_each_bad_line_is_reported_and_the_others_are_mined(batch):
    bad = [
        ("{not json", "not JSON"),
        ("[" * 9999, "not JSON"),
        ("[1]", 'no "name"'),
        ('{"kind": "place"}', 'no "name"'),
        ({"name": 7}, 'no "name"'),
        ({"name": ""}, "give an id"),
        ({"name": "", "id": "empty"}, "empty"),
        ({"name": "!!"}, "give an id"),
        ({"name": "Ann", "colour": "red"}, "'colour'"),
        ({"name": "Ann", "aliases": "Anne"}, "'aliases'"),
        ({"name": "Ann", "prompts": [1]}, "'prompts'"),
        ({"name": "Ann", "private": "yes"}, "'private'"),
        ({"name": "Ann", "id": 5}, "'id'"),
        ({"name": "Ann", "id": "../out"}, "not valid"),
        ({"name": "Ann", "id": "x" * 300}, "not valid"),
        ({"name": "Ann", "kind": "dragon"}, "dragon"),
        ({"name": "Ann", "prompts": ["{}"]}, "at least 8"),
    ]
    report = batch.run([{"name": "Rome"}, *(line for line, _ in bad), {"name": "Line\u2028break"}, {"name": "Oslo"}])
    assert [report.done, report.skipped] == [[1, len(bad) + 3], []]
    assert [number for number, _ in report.failed] == list(range(2, len(bad) + 3))
    for (_, told), (line, message) in zip(bad, report.failed, strict=False):
        assert told in message and "\n" not in message, line
    assert batch.names() == ["oslo.kif.safetensors", "rome.kif.safetensors"]


def test_an_id_is_given_once(batch):
    lines = [
        {"name": "New York"},
        {"name": "new  york"},
        {"name": "Ann", "id": "a1", "private": True},
        {"name": "Bob", "id": "a1", "private": True},
        {"name": "Cid", "id": "new-york"},
    ]
    report = batch.run(lines)
    assert report.done == [1, 3] and [number for number, _ in report.failed] == [2, 4, 5]
    assert "line 1" in report.failed[0][1] and "line 3" in report.failed[1][1]


def test_an_interrupted_batch_goes_on_where_it_stopped(batch):
    lines = [{"name": name} for name in ("Rome", "Oslo", "Lima")]

    def interrupt(done, total, what):
        if what == "mining subjects" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch.run(lines, progress=interrupt)
    assert batch.names() == ["oslo.kif.safetensors", "rome.kif.safetensors"]  # and no temporary file
    before = {p: p.stat().st_mtime_ns for p in batch.folder.iterdir()}
    report = batch.run(lines)
    assert (report.done, report.skipped, report.failed) == ([3], [1, 2], [])
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert batch.run(lines).skipped == [1, 2, 3]


def test_a_line_that_would_be_mined_otherwise_than_what_is_there_is_an_error(batch):
    assert batch.run([{"name": "C++"}, {"name": "Ann", "id": "a1", "private": True}]).done == [1, 2]
    before = [(path, path.read_bytes()) for path in sorted(batch.folder.iterdir())]
    for line, options, says in (
        ({"name": "C#"}, {}, "name or aliases"),
        ({"name": "C++", "aliases": ["C plus plus"]}, {}, "name or aliases"),
        ({"name": "C++"}, {"any_case": True}, "--any-case"),
        ({"name": "C++", "id": "c"}, {"method": "kif-paper"}, "method"),
        ({"name": "C++", "prompts": OWN}, {}, "prompts"),
        ({"name": "C++"}, {"steps": 1}, "steps"),
        ({"name": "C++"}, {"passages": OWN}, "another text"),
        ({"name": "C++"}, {"site": 2}, "site"),
        ({"name": "Ann", "id": "a1", "private": True}, {"any_case": True}, "--any-case"),
    ):
        report = batch.run([line], **options)
        assert (report.done, report.skipped, len(report.failed)) == ([], [], 1), says
        message = report.failed[0][1]
        assert says in message and "choose another folder" in message and "\n" not in message
    assert before == [(path, path.read_bytes()) for path in sorted(batch.folder.iterdir())]
    report = batch.run([{"name": "C++"}, {"name": "Ann", "id": "a1", "private": True}], site=None, any_case=False)
    assert report.skipped == [1, 2]


@pytest.mark.parametrize("settings", [None, 7, ["adapter"], "x"])
def test_what_says_nothing_of_how_it_was_mined_is_an_error_of_the_line(batch, settings):
    batch.run([{"name": "Rome"}])
    path = batch.folder / "rome.kif.safetensors"
    odd = replace(Capsule.load(path), provenance={"settings": settings})
    odd.save(path, overwrite=True)
    ((number, message),) = batch.run([{"name": "Rome"}]).failed
    assert number == 1 and "was mined with another" in message


def test_an_interruption_while_a_file_is_written_leaves_no_half_of_it(batch, monkeypatch):
    lines = [{"name": "Rome"}, {"name": "Oslo"}]

    def interrupted(handle):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kif_runtime.files.os.fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batch.run(lines)
    assert batch.names() == []
    assert batch.run(lines).done == [1, 2]


def test_a_private_line_without_an_id_is_mined_again_and_reserves_none(batch):
    lines = [{"name": "Rome", "private": True}, {"name": "Rome"}]
    assert batch.run(lines).done == [1, 2]
    report = batch.run(lines)
    assert (report.done, report.skipped) == ([1], [2])
    assert len(batch.names()) == 3 and "rome.kif.safetensors" in batch.names()


def test_a_whole_batch_can_be_private(batch):
    report = batch.run([{"name": "Rome"}, {"name": "Oslo", "id": "o1"}], private=True)
    assert report.done == [1, 2]
    random, own = sorted(batch.names(), key=len, reverse=True)
    assert own == "o1.kif.safetensors" and re.fullmatch(r"[0-9a-f]{32}\.kif\.safetensors", random)


def test_a_damaged_file_or_one_of_another_model_is_reported_not_replaced(tiny, batch):
    batch.run([{"name": "Rome"}, {"name": "Oslo"}])
    rome, oslo = batch.folder / "rome.kif.safetensors", batch.folder / "oslo.kif.safetensors"
    rome.write_bytes(rome.read_bytes()[:99])
    replace(Capsule.load(oslo), model="0" * 64).save(oslo)
    report = batch.run([{"name": "Rome"}, {"name": "Oslo"}, {"name": "Lima"}])
    assert report.done == [3]
    assert "rome.kif.safetensors" in report.failed[0][1] and "another model" in report.failed[1][1]
    assert rome.stat().st_size == 99


@pytest.mark.parametrize("content", [None, b"\xff\xfe{}"])
def test_requests_that_cannot_be_read_are_one_line(tiny, tmp_path, content):
    path = tmp_path / "requests.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MiningError, match=r"cannot read .*requests\.jsonl"):
        mine_batch(tiny.model, tiny.tokenizer, path, tmp_path / "out")


def test_a_folder_that_cannot_be_made_is_one_line(tiny, tmp_path):
    requests = tmp_path / "requests.jsonl"
    requests.write_text('\ufeff{"name": "Rome"}\r\n', encoding="utf-8")
    with pytest.raises(MiningError, match="cannot make"):
        mine_batch(tiny.model, tiny.tokenizer, requests, requests)
    assert mine_batch(tiny.model, tiny.tokenizer, requests, tmp_path / "out", steps=0).done == [1]
