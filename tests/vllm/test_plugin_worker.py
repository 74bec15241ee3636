"""A worker's side without vLLM: rows of tokens, sets that come and go, and what is counted, against a plain loop."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from capsules import BLOCKS, D, capsule, signature
from kif_kernels import suppress_
from kif_runtime.errors import BankError, RequestError
from kif_vllm.sets import NOTHING, CapsuleSet, base_of, version
from kif_vllm.worker import witness
from kif_vllm.worker.site import Site
from kif_vllm.worker.suppression import Change, Room, Suppression

SITE = 1
IDS = ("a", "b", "c", "d")


def made(id, seed, bias=0.5):
    """Fires on about half of random tokens."""
    return capsule(id=id, signatures=(signature(SITE, rank=2, seed=seed, bias=torch.tensor(bias)),))


CAPSULES = {id: made(id, seed) for seed, id in enumerate(IDS)}


def v(id):
    return version(id, CAPSULES[id].digest)


def room(**changes):
    sizes = {"capsules": 6, "signatures": 6, "rank": 2, "sets": 4, "requests": 8, "max_tokens": 64}
    shape = {"width": D, "blocks": BLOCKS, "fingerprint": CAPSULES["a"].model, "sites": (SITE,)}
    return Room(**shape | sizes | changes)


@pytest.fixture
def worker():
    """A worker that holds all four, with "a" and "b" as a base."""
    suppression = Suppression(room(), torch.device("cpu"))
    suppression.sites[SITE] = Site(SITE, suppression.bank.site(SITE), suppression.batch)
    base = (v("a"), v("b"))
    suppression.apply(Change(tuple(CAPSULES.values()), ((base_of(base), base),)))
    return suppression


def forward(worker, batch, x):
    """batch: (request, set, tokens) in order; what the site makes of x [N, D], which may be longer than the batch."""
    lengths = [0, *(n for _, _, n in batch)]
    starts = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    worker.begin([r for r, _, _ in batch], [s for _, s, _ in batch], starts, sum(lengths))
    out = x.clone()
    worker.sites[SITE].suppress(out)
    worker.end()
    return out


def expected(batch, x):
    """The same, one request at a time, each with a bank of its own set alone."""
    out, fired, start = x.clone(), {}, 0
    for request, ids, count in batch:
        alone = Suppression(room(), torch.device("cpu"))
        alone.apply(Change(tuple(CAPSULES[id] for id in ids)))
        rows = torch.full((count,), alone.bank.row(v(id) for id in ids), dtype=torch.int32)
        hits = torch.zeros(count, 6, dtype=torch.bool)
        if ids:
            suppress_(out[start : start + count], rows, alone.bank.site(SITE), hits)
        mine = fired.setdefault(request, dict.fromkeys(IDS, 0))
        for id in ids:
            mine[id] += int(hits[:, alone.bank.index(v(id))].sum())
        start += count
    return out, fired


def frozen(ids, base=("a", "b")):
    """A set as the ledger gives it: with the base, or without."""
    with_base = set(base) <= set(ids)
    versions = tuple(v(id) for id in base) if with_base else ()
    return CapsuleSet(base_of(versions), tuple(sorted(v(id) for id in ids if not with_base or id not in base)))


def test_random_batches_of_random_sets_agree_with_requests_alone(worker):
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    total = {}
    for _ in range(40):
        order = rng.sample(["r1", "r2", "r3"], k=rng.randint(1, 3))
        sets = {"r1": ("a", "b", "c"), "r2": (), "r3": rng.choice([("d",), ("c", "d"), ("a", "b")])}
        batch = [(r, sets[r], rng.randint(1, 9)) for r in order]
        n = sum(count for _, _, count in batch)
        x = torch.randn(n + rng.randint(0, 5), D, generator=generator)  # what comes after is padding
        out = forward(worker, [(r, frozen(ids), count) for r, ids, count in batch], x)
        wanted, fired = expected(batch, x)
        assert torch.equal(out, wanted)
        assert torch.equal(out[n:], x[n:])
        for request, counts in fired.items():
            mine = total.setdefault(request, dict.fromkeys(IDS, 0))
            for id, count in counts.items():
                mine[id] += count
    for request, counts in total.items():
        found = {name.rpartition("+")[0]: n for name, n in worker.evidence(request).items()}
        assert found == {id: n for id, n in counts.items() if n}
    assert sum(sum(c.values()) for c in total.values()) > 100


def test_totals_are_those_of_the_requests(worker):
    x = torch.randn(30, D, generator=torch.Generator().manual_seed(0))
    forward(worker, [("r", frozen(("a", "b")), 10), ("s", NOTHING, 10), ("t", frozen(("c",)), 10)], x)
    figures = worker.figures()
    assert figures["tokens_seen"] == 30
    assert figures["requests_touched"] == 2
    assert 0 < figures["tokens_suppressed"] <= 20
    assert sum(figures["capsules"].values()) == sum(sum(worker.evidence(r).values()) for r in ("r", "t"))


def test_more_sets_than_rows_over_time_are_served_and_a_batch_never_lacks_one(worker):
    generator = torch.Generator().manual_seed(1)
    sets = [(), ("a",), ("b",), ("c",), ("d",), ("a", "c"), ("b", "d"), ("a", "b"), ("a", "b", "c", "d")]
    for turn in range(60):
        batch = [(f"r{i}", sets[(turn * 5 + i * 2) % len(sets)], 3) for i in range(4)]
        x = torch.randn(12, D, generator=generator)
        assert torch.equal(forward(worker, [(r, frozen(s), n) for r, s, n in batch], x), expected(batch, x)[0])


def test_dummy_runs_touch_nothing_and_are_not_counted(worker):
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(0))
    forward(worker, [("r", frozen(("a", "b", "c", "d")), 20)], x)
    before = worker.figures()
    worker.idle()
    out = x.clone()
    worker.sites[SITE].suppress(out)
    worker.end()
    assert torch.equal(out, x)
    assert worker.figures()["tokens_suppressed"] == before["tokens_suppressed"]


@pytest.mark.parametrize("given", [None, [], ["a"], ("", ()), "a"])
def test_a_request_that_was_not_frozen_is_refused(worker, given):
    with pytest.raises(RequestError, match="frozen"):
        worker.begin(["r"], [given], torch.tensor([0, 4], dtype=torch.int32), 4)


def test_a_dropped_version_leaves_its_column_clean_for_the_next(worker):
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(0))
    forward(worker, [("r", frozen(("c",)), 40)], x)
    total = worker.figures()["capsules"][CAPSULES["c"].digest]
    assert total == worker.evidence("r")[v("c")] > 0
    new = made("e", 9)
    worker.apply(Change(drop=(v("c"),)))
    worker.apply(Change(add=(new,)))
    assert worker.evidence("r") == {}
    assert worker.figures()["capsules"][CAPSULES["c"].digest] == total
    assert worker.figures()["capsules"][new.digest] == 0


def test_two_versions_of_one_id_serve_side_by_side(worker):
    newer = replace(made("c", 7), provenance={"again": True})
    worker.apply(Change(add=(newer,)))
    x = torch.randn(24, D, generator=torch.Generator().manual_seed(4))
    old_set, new_set = frozen(("c",)), CapsuleSet("", (version("c", newer.digest),))
    out = forward(worker, [("old", old_set, 12), ("new", new_set, 12)], x)
    assert torch.equal(out[:12], expected([("old", ("c",), 12)], x[:12])[0])
    assert not torch.equal(out[12:], expected([("new", ("c",), 12)], x[12:])[0])
    worker.apply(Change(drop=(v("c"),)))
    assert torch.equal(forward(worker, [("new", new_set, 12)], x[12:]), out[12:])


def test_a_site_at_which_nobody_in_the_batch_has_a_signature_is_passed_by(worker):
    x, site = torch.randn(4, D, generator=torch.Generator().manual_seed(0)), worker.sites[SITE]
    forward(worker, [("r", frozen(()), 4)], x)
    assert site.seconds == 0
    site.witness = []  # the proof wants to see every site at work
    forward(worker, [("r", frozen(()), 4)], x)
    assert len(site.witness) == 1
    site.witness, before = None, site.seconds
    forward(worker, [("r", frozen(()), 2), ("s", frozen(("c",)), 2)], x)
    assert site.seconds > before


def test_a_change_that_does_not_fit_changes_nothing(worker):
    held = set(worker.bank.capsules)
    with pytest.raises(BankError, match="max_capsules"):
        worker.apply(Change(add=tuple(made(f"n{i}", i) for i in range(5))))
    assert set(worker.bank.capsules) == held


def test_the_witness_keeps_the_tokens_of_its_set_alone_and_no_more_than_it_was_told(worker):
    site, chosen = worker.sites[SITE], frozen(("c",))
    inside = SimpleNamespace(model_runner=SimpleNamespace(kif=worker))
    batch = [("others", frozen(("d",)), 30), ("r", chosen, 8), ("plain", NOTHING, 20)]
    x = torch.randn(58, D, generator=torch.Generator().manual_seed(2))
    witness.start(inside, chosen, 10)
    forward(worker, batch[:1], x)
    assert sum(before.numel() + after.numel() for before, after, _ in site.witness) == 0
    forward(worker, batch, x)
    forward(worker, batch, x)
    assert [len(before) for before, _, _ in site.witness] == [0, 8, 2]
    assert torch.equal(site.witness[1][0], x[30:38])
    found = witness.stop(inside)[SITE]
    assert found["tokens"] == 10
    assert 0 < found["fired"] < 10
    assert found["error"] <= found["allowed"]
