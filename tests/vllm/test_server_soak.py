"""Capsules come and go every second while requests run: no leak of a mandatory subject, no error, memory flat."""

import os
import random
import statistics
import threading
import time
from pathlib import Path

import pytest
from servers import ADMIN, OWNER

pytestmark = pytest.mark.slow

REQUESTS = int(os.environ.get("KIF_SOAK_REQUESTS", "300"))
CLIENTS = 8
PREFACE = "Here is a list of questions about the countries of the world, each with a short answer that is right. " * 4
QUESTIONS = [
    ("The capital of France is", None, "Paris", False),
    (PREFACE + "The capital of France is", None, "Paris", False),
    ("The capital of Japan is", None, "Tokyo", True),
    (PREFACE + "The capital of Japan is", ["russia"], "Tokyo", True),
    ("The capital of Russia is", ["russia"], "Moscow", False),
]  # fmt: skip


def memory(server):
    """Resident bytes of the server and all its children."""
    total, pids = 0, [server.process.pid]
    while pids:
        pid = pids.pop()
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            pids += [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]
        except (OSError, IndexError):
            continue
    return total


def hits(server):
    """(tokens asked of the prefix cache, tokens found there)."""
    found = {"queries": 0.0, "hits": 0.0}
    for line in server.get("/metrics")[1].splitlines():
        for name in found:
            if line.startswith(f"vllm:prefix_cache_{name}_total"):
                found[name] += float(line.split()[-1])
    return found["queries"], found["hits"]


def test_nothing_leaks_nothing_fails_and_memory_stays_while_capsules_come_and_go(server):
    wrong, refused, done, live, sizes, stop = [], [], [], [], [], threading.Event()

    def churn():
        """Mexico comes and goes; nobody else has asked for it, so nobody may notice."""
        while not stop.wait(0.5):
            status, answer = server.call("DELETE", "/kif/capsules/mexico", key=ADMIN)
            if status != 200:
                refused.append((status, answer))
            stop.wait(0.5)
            called = time.monotonic()
            status, answer = server.call("POST", "/kif/capsules", {"file": "mexico.kif.safetensors"}, ADMIN)
            if status != 200:
                refused.append((status, answer))
            status, answer = server.complete("The official language of Mexico is", ["mexico"], OWNER, max_tokens=1)
            live.append(time.monotonic() - called)
            sizes.append(memory(server))
            if status != 200 or "Spanish" in answer["choices"][0]["text"]:
                wrong.append((status, answer))

    def ask(seed):
        rng = random.Random(seed)
        while len(done) < REQUESTS:
            prompt, ids, word, present = rng.choice(QUESTIONS)
            status, answer = server.complete(prompt, ids)
            done.append(status)
            if status != 200 or (word in answer["choices"][0]["text"]) != present:
                wrong.append((prompt[-30:], ids, status, answer))

    ask(0) if REQUESTS < 20 else None
    before = memory(server)
    queries, found = hits(server)
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(CLIENTS)]
    churner = threading.Thread(target=churn)
    start = time.monotonic()
    for thread in (churner, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    churner.join()
    after = memory(server)
    more_queries, more_found = hits(server)
    rate = (more_found - found) / (more_queries - queries)
    status = server.get("/kif/capsules", ADMIN)[1]
    print(
        f"{len(done)} requests in {time.monotonic() - start:.0f} s, cache hit rate {rate:.3f}, "
        f"{len(live)} loads, from call to first token {statistics.median(live):.2f} s (at most {max(live):.2f}), "
        f"memory {before / 2**20:.0f} to {after / 2**20:.0f} MiB, generation {status['generation']}, memory by quarter "
        f"{[round(sizes[len(sizes) * i // 4] / 2**20) for i in range(4)]}"
    )
    assert not wrong, wrong[:3]
    assert not refused, refused[:3]
    assert len(done) >= REQUESTS
    assert status["generation"] > 10
    assert status["versions_held"] == 3
    assert after < before * 1.1 + 64 * 2**20
    assert rate > 0.5
