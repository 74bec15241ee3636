"""Data parallelism: one API server before two engines, each with capsules of its own, which must not differ."""

import shutil
import threading

import pytest
from servers import ADMIN, Server

pytestmark = pytest.mark.slow

FRANCE, RUSSIA = "The capital of France is", "The capital of Russia is"


@pytest.fixture(scope="module")
def two(mined, tmp_path_factory):
    """France is mandatory, the others may be named."""
    place = tmp_path_factory.mktemp("engines")
    shutil.copytree(mined, place / "capsules")
    flags = ("--enforce-eager", "--data-parallel-size", "2", "--max-num-seqs", "8")
    running = Server(place / "capsules", place / "log.txt", {"mandatory": ["france"], "watch": 0}, flags)
    try:
        yield running.wait()
    finally:
        running.close()


def answers(server, prompt, ids=None, count=12):
    """So many at once that both engines get some."""
    found = []

    def ask():
        found.append(server.text(prompt, ids))

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def engines(server):
    """Which engines have answered requests."""
    lines = server.get("/metrics")[1].splitlines()
    done = [line for line in lines if line.startswith("vllm:request_success_total") and float(line.split()[-1]) > 0]
    return {line.split('engine="')[1].split('"')[0] for line in done}


def test_a_mandatory_subject_is_gone_in_every_engine_and_a_named_one_for_who_names_it(two):
    assert not any("Paris" in text for text in answers(two, FRANCE))
    assert all("Moscow" in text for text in answers(two, RUSSIA))
    assert not any("Moscow" in text for text in answers(two, RUSSIA, ["russia"]))
    assert engines(two) == {"0", "1"}


def test_a_change_returns_when_every_engine_has_it(two):
    assert two.call("DELETE", "/kif/capsules/russia", key=ADMIN)[0] == 200
    assert two.complete(RUSSIA, ["russia"])[0] == 400
    assert two.call("POST", "/kif/capsules", {"file": "russia.kif.safetensors"}, ADMIN)[0] == 200
    assert not any("Moscow" in text for text in answers(two, RUSSIA, ["russia"]))


def test_counts_are_those_of_all_engines(two):
    before = two.metrics()["kif_requests_touched_total"]
    answers(two, FRANCE)
    assert two.metrics()["kif_requests_touched_total"] == before + 12
