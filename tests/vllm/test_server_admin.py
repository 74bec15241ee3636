"""A running server's admin side: routes and their key, evidence, capsules that come and go, metrics, the audit log."""

import json
import threading
import time

import pytest
from servers import ADMIN, OWNER

from kif_runtime import Capsule
from kif_runtime.mining.control import usual_sites

pytestmark = pytest.mark.slow

FRANCE, JAPAN, RUSSIA = "The capital of France is", "The capital of Japan is", "The capital of Russia is"


@pytest.mark.parametrize("key", [None, "", "wrong", ADMIN + "x", ADMIN[:-1], OWNER])
@pytest.mark.parametrize(("method", "path"), [
    ("GET", "/kif/capsules"), ("POST", "/kif/capsules"), ("DELETE", "/kif/capsules/france"), ("POST", "/kif/verify"),
    ("GET", "/kif/status"),
])  # fmt: skip
def test_admin_routes_want_the_admin_key(server, method, path, key):
    body = {"file": "france.kif.safetensors"} if (method, path) == ("POST", "/kif/capsules") else None
    assert server.call(method, path, body, key)[0] == 401


def test_capsules_are_listed_without_names(server):
    status, answer = server.get("/kif/capsules", ADMIN)
    assert status == 200
    assert {c["id"]: c["mandatory"] for c in answer["capsules"]} == {"france": True, "mexico": False, "russia": False}
    assert all(len(c["digest"]) == 12 for c in answer["capsules"])


def test_the_proof_can_be_run_again(server, monkeypatch, capsys):
    from typer.testing import CliRunner

    from kif_cli.main import app

    monkeypatch.setenv("KIF_ADMIN_KEY", ADMIN)
    result = CliRunner().invoke(app, ["verify", "--url", server.url, "--json"])
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert answer["proven"]
    assert answer["ranks"] == 1
    monkeypatch.setenv("KIF_ADMIN_KEY", "wrong")
    assert CliRunner().invoke(app, ["verify", "--url", server.url]).exit_code != 0


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b'{"file": 3}', b'{"file": "../france.kif.safetensors"}', b'{"file": "/etc/passwd"}',
     b'{"file": "none.kif.safetensors"}', b'{"file": "france.kif.safetensors", "in_flight": "maybe"}',
     b'{"file": "france.kif.safetensors", "more": 1}', b'{"file": "a/../france.kif.safetensors"}', b"\xff\xfe"],
)  # fmt: skip
def test_malformed_admin_requests_are_refused(server, body):
    status, _ = server.call("POST", "/kif/capsules", body, ADMIN)
    assert 400 <= status < 500
    assert "Paris" not in server.text(FRANCE)


@pytest.mark.parametrize("id", ["nobody", "..%2f..%2fetc%2fpasswd", "france%00", "%F0%9F%98%80"])
def test_unloading_what_is_not_there_is_not_found(server, id):
    assert server.call("DELETE", f"/kif/capsules/{id}", key=ADMIN)[0] in (404, 405)


def test_evidence_is_for_admins(server):
    body = {"model": "m", "prompt": FRANCE, "max_tokens": 8, "temperature": 0, "vllm_xargs": {"kif": ["russia"]}}
    status, answer = server.call("POST", "/v1/completions", body, x_kif_key=ADMIN)
    assert status == 200
    assert answer["kif"] == {"applied": ["france", "russia"], "fired": {"france": 1}}
    for key in ("wrong", ""):
        assert "kif" not in server.call("POST", "/v1/completions", body, x_kif_key=key)[1]
    assert "kif" not in server.call("POST", "/v1/completions", body)[1]


def test_evidence_of_several_samples_is_added_up(server):
    body = {"model": "m", "prompt": [FRANCE, JAPAN], "max_tokens": 4, "temperature": 0.5, "n": 2}
    _, answer = server.call("POST", "/v1/completions", body, x_kif_key=ADMIN)
    assert answer["kif"]["fired"]["france"] >= 1
    assert len(answer["choices"]) == 4


def test_evidence_ends_a_stream_in_a_form_that_the_client_reads(server):
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="nobody", default_headers={"x-kif-key": ADMIN})
    events = list(client.completions.create(model="m", prompt=FRANCE, max_tokens=6, temperature=0, stream=True))
    assert events[-1].kif == {"applied": ["france"], "fired": {"france": 1}}
    assert "Paris" not in "".join(e.choices[0].text for e in events if e.choices)


def test_evidence_is_in_the_event_that_ends_a_stream_of_responses(server):
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="nobody", default_headers={"x-kif-key": ADMIN})
    question = "Tell me in one word what the capital of France is."  # asked nowhere else: cached tokens are not counted
    events = list(client.responses.create(model="m", input=question, stream=True))
    assert events[-1].type == "response.completed"
    assert events[-1].response.kif == {"applied": ["france"], "fired": {"france": 1}}
    assert "Paris" not in events[-1].response.output_text


# -- capsules that come and go


def loaded(server):
    return {c["id"] for c in server.get("/kif/capsules", ADMIN)[1]["capsules"]}


def running(server):
    """How many requests the engine is at work on."""
    lines = server.get("/metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_a_change_takes_effect_within_a_second_and_drops_nobody(server):
    """The quickest of three: a machine that does other work beside the server may hold one of them up."""
    running, seconds = {}, []
    other = threading.Thread(target=lambda: running.update(text=server.text(JAPAN, max_tokens=60)))
    other.start()
    for _ in range(3):
        status, answer = server.call("DELETE", "/kif/capsules/russia", key=ADMIN)
        assert (status, answer["in_flight"], answer["aborted"]) == (200, "finish", 0)
        assert server.complete(RUSSIA, ["russia"])[0] == 400
        start = time.monotonic()
        status, answer = server.call("POST", "/kif/capsules", {"file": "russia.kif.safetensors"}, ADMIN)
        first = server.text(RUSSIA, ["russia"], max_tokens=1)
        seconds.append(time.monotonic() - start)
        assert status == 200
        assert "Moscow" not in first
    assert min(seconds) < 1.0
    other.join()
    assert "Tokyo" in running["text"]


def test_a_mandatory_capsule_taken_out_aborts_who_was_frozen_with_it_unless_told_to_let_them_finish(server):
    found = {}

    def ask(name):
        found[name] = server.complete(JAPAN, max_tokens=300, ignore_eos=True)

    for name, flag in (("aborted", ""), ("finished", "?in_flight=finish")):
        thread = threading.Thread(target=ask, args=(name,))
        thread.start()
        until(lambda: running(server) == 1)
        assert server.call("DELETE", f"/kif/capsules/france{flag}", key=ADMIN)[0] == 200
        thread.join()
        assert "Paris" in server.text(FRANCE)
        assert (
            server.call("POST", "/kif/capsules", {"file": "france.kif.safetensors", "in_flight": "finish"}, ADMIN)[0]
            == 200
        )
        assert "Paris" not in server.text(FRANCE)
    assert found["finished"][1]["choices"][0]["finish_reason"] == "length"
    status, answer = found["aborted"]
    assert status != 200 or answer["choices"][0]["finish_reason"] == "abort"


def test_the_directory_is_watched(server, folder):
    away = folder.parent / "away.kif.safetensors"
    (folder / "russia.kif.safetensors").rename(away)
    until(lambda: loaded(server) == {"france", "mexico"})
    assert server.complete(RUSSIA, ["russia"])[0] == 400
    away.rename(folder / "russia.kif.safetensors")
    until(lambda: "russia" in loaded(server))
    assert "Moscow" not in server.text(RUSSIA, ["russia"])


def test_a_capsule_comes_live_with_signatures_where_those_of_the_start_had_none(server, folder, everywhere):
    at_start = {site for path in folder.iterdir() for site in Capsule.load(path).sites}
    assert set(everywhere.sites) == set(usual_sites(everywhere.blocks)) > at_start
    prompts = [f"The capital of {name} is" for name in ("Great Britain", "England")]
    path = folder / "great-britain.kif.safetensors"
    everywhere.save(path)
    try:
        until(lambda: "great-britain" in loaded(server))
        for prompt in prompts:
            assert "London" in server.text(prompt)
            assert "London" not in server.text(prompt, ["great-britain"], key=OWNER)
    finally:
        path.unlink()
    until(lambda: "great-britain" not in loaded(server))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff" * 64, b"\x00" * 4096], ids=len)
def test_a_corrupt_file_in_the_directory_is_refused_and_the_old_bank_stays(server, folder, content):
    path = folder / "france.kif.safetensors"
    good = path.read_bytes()
    path.write_bytes(content)
    time.sleep(1.0)
    assert "Paris" not in server.text(FRANCE)
    assert "france" in loaded(server)
    path.write_bytes(good)
    time.sleep(0.5)
    assert "Paris" not in server.text(FRANCE)


def test_an_oversized_file_is_refused(server, folder):
    path = folder / "big.kif.safetensors"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    time.sleep(1.0)
    assert "big" not in loaded(server)
    path.unlink()
    assert "refused a file" in server.log.read_text()


def test_the_servers_log_names_no_capsule(server):
    """After all of the above: files refused, capsules loaded and taken out by id."""
    log = server.log.read_text().lower()
    assert "/kif/capsules/…" in log
    assert not any(word in log for word in ("russia", "mexico", "great-britain", "big.kif", "france.kif"))


# -- metrics, log, privacy


def test_metrics_count_tokens_and_requests_and_name_nobody(server):
    before = server.metrics()
    server.text(FRANCE)
    server.text(JAPAN)
    after = server.metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["kif_tokens_seen_total"] == 2 * (5 + 7)
    assert grown["kif_tokens_suppressed_total"] == 1
    assert grown["kif_requests_touched_total"] == 1
    assert 0 < after["kif_gate_share"] < 1
    digest = next(c["digest"] for c in server.get("/kif/capsules", ADMIN)[1]["capsules"] if c["id"] == "france")
    assert grown[f'kif_capsule_tokens_total{{capsule="{digest}"}}'] == 1
    assert not any("france" in name.lower() for name in after)


def test_the_audit_log_holds_acts_and_digests_and_no_name(server):
    lines = [json.loads(line) for line in server.audit.read_text().splitlines()]
    assert {line["act"] for line in lines} >= {"load", "unload", "rescan"}
    assert any("refused" in line for line in lines)
    assert any(line.get("digests") for line in lines)
    text = server.audit.read_text().lower()
    assert not any(word in text for word in ("france", "russia", "mexico", "paris", "capital", ADMIN))
    assert server.audit.stat().st_mode & 0o077 == 0
