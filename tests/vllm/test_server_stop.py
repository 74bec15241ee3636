"""The end of a server whose worker is killed: it fails closed. Runs last; the server is gone afterwards."""

import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def children(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


def title(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def test_a_killed_worker_ends_the_server_and_no_text_comes_out_unsuppressed(server):
    assert "Paris" not in server.text("The capital of France is")
    workers = [pid for pid in children(server.process.pid) if "Worker" in title(pid)]
    assert workers, [title(pid) for pid in children(server.process.pid)]
    os.kill(workers[0], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            status, answer = server.complete("The capital of France is")
        except OSError:
            return  # nothing listens any more
        if status == 200:
            assert "Paris" not in answer["choices"][0]["text"]
        else:
            assert status >= 500
            return
        time.sleep(0.2)
    raise AssertionError("the server went on as if its worker lived")
