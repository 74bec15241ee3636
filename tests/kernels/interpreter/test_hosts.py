"""Hosts on a GPU: where sets may be long they list candidates before they suppress, and nothing comes out otherwise."""

from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import Tensor

from capsules import BLOCKS, D, capsule, signature
from kif_kernels import Candidates
from kif_vllm.sets import NOTHING, CapsuleSet, base_of, version
from kif_vllm.worker.site import Site
from kif_vllm.worker.suppression import Change, Room, Suppression

SITE, ROOM, MANY, MOST = 1, 80, 70, 12


def made(number: int, bias: float = -7.0):
    name = f"c{number:03d}"
    return capsule(id=name, signatures=(signature(SITE, rank=1, seed=number, bias=torch.tensor(bias)),))


CAPSULES = [made(n) for n in range(MANY)]
OFTEN = [made(n, bias=20.0) for n in range(100, 105)]


def worker(signatures: int = ROOM) -> Suppression:
    room = Room(
        width=D, blocks=BLOCKS, fingerprint=CAPSULES[0].model, sites=(SITE,), capsules=ROOM, signatures=signatures,
        rank=1, sets=4, requests=8, max_tokens=MOST,
    )  # fmt: skip
    made = Suppression(room, torch.device("cpu"))
    made.sites[SITE] = Site(SITE, made.bank.site(SITE), made.batch)
    return made


def names(capsules) -> tuple[str, ...]:
    return tuple(version(c.id, c.digest) for c in capsules)


def put(worker: Suppression, capsules, drop=()) -> CapsuleSet:
    """Load `capsules`, drop others; the set of all that are then there."""
    worker.apply(Change(add=tuple(capsules), drop=names(drop)))
    base = tuple(worker.bank.capsules)
    worker.apply(Change(bases=((base_of(base), base),)))
    return CapsuleSet(base_of(base), ())


def forward(worker: Suppression, form: str, batch: list[tuple[CapsuleSet, int]], seed: int) -> list[Tensor]:
    """What a site makes of random tokens, padding after the batch's, in one of its three forms; and the hits."""
    lengths = [0, *(n for _, n in batch)]
    starts = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    worker.begin([f"r{i}" for i in range(len(batch))], [s for s, _ in batch], starts, sum(lengths))
    x, residual = torch.randn(2, sum(lengths) + 2, D, generator=torch.Generator().manual_seed(seed))
    site, norm = worker.sites[SITE], (torch.ones(D), 1e-5, False)
    if form == "suppress":
        site.suppress(x)
    elif form == "add_norm":
        site.add_norm(x, residual, *norm)
    else:
        site.after_norm(x, residual, *norm)
    found = [x, residual, worker.batch.hits[: len(x)].clone()]
    worker.end()
    return found


def life(form: str) -> list[list[Tensor]]:
    """A server's: long sets and none, capsules that come and go, lists that overflow, steps of any size."""
    there = worker()
    addresses = [t.data_ptr() for t in vars(there.batch.buffers).values()] if there.batch.buffers else []
    every = put(there, CAPSULES)
    few = CapsuleSet("", names(CAPSULES[3:5]))
    steps = [forward(there, form, [(every, 4), (NOTHING, 2), (few, 2)], 1)]
    fewer = put(there, (), drop=CAPSULES[:20])
    steps.append(forward(there, form, [(NOTHING, 1), (fewer, 1)], 2))
    more = put(there, [replace(c, id=f"d{c.id}") for c in CAPSULES[:5]] + OFTEN)
    steps.append(forward(there, form, [(fewer, 2), (more, MOST - 4)], 3))
    assert addresses == ([t.data_ptr() for t in vars(there.batch.buffers).values()] if addresses else [])
    return steps


@pytest.mark.parametrize(
    ("form", "kernel"),
    [
        ("suppress", "suppress_kernel"),
        ("add_norm", "add_norm_suppress_kernel"),
        ("after_norm", "suppress_normed_kernel"),
    ],
)
def test_a_servers_sites_list_first_and_nothing_comes_out_otherwise(
    form, kernel, launched, as_on_a_gpu, monkeypatch
) -> None:
    listing = life(form)
    assert launched == ["detect_kernel", kernel] * 3
    with monkeypatch.context() as without:
        without.setattr(import_module("kif_kernels.detect"), "wants_listing", lambda site: False)
        plain = life(form)
    assert "detect_kernel" not in launched[6:]
    for step, same in zip(listing, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step, same, strict=True))
    assert listing[0][2].any()
    assert listing[2][2].sum(1).max() >= len(OFTEN)


def test_a_site_that_lists_has_the_bits_of_the_cpu(request, monkeypatch) -> None:
    """And where a list holds four signatures only: all tokens of the last set overflow, as five always fire."""
    on_cpu = life("add_norm")
    request.getfixturevalue("as_on_a_gpu")
    monkeypatch.setattr(Candidates, "empty", partial(Candidates.empty, limit=4))
    for (_, total, hits), (_, expected, expected_hits) in zip(life("add_norm"), on_cpu, strict=True):
        assert torch.equal(total, expected)
        assert torch.equal(hits, expected_hits)


@pytest.mark.parametrize("signatures", [64, 65])
def test_room_for_64_signatures_needs_one_launch(signatures, launched, as_on_a_gpu) -> None:
    there = worker(signatures)
    assert (there.batch.buffers is not None) == (signatures == 65)
    every = put(there, CAPSULES[:64])
    forward(there, "add_norm", [(every, 3)], 1)
    assert launched == ["detect_kernel"] * (signatures - 64) + ["add_norm_suppress_kernel"]


def test_on_the_cpu_nothing_is_listed() -> None:
    assert worker().batch.buffers is None


def test_a_hugging_face_model_lists_too(tiny_model, launched, request) -> None:
    """70 signatures at one block, on a batch of which one row has none; the logits are those of the CPU's path."""
    from kif_hf import attach
    from kif_runtime.fingerprint import fingerprint

    model = tiny_model("llama", hidden_size=D, num_attention_heads=2, num_key_value_heads=2, head_dim=6)
    blocks = model.config.num_hidden_layers
    signatures = tuple(s for c in CAPSULES for s in c.signatures)
    many = replace(CAPSULES[0], signatures=signatures, model=fingerprint(model), blocks=blocks)
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad(), attach(model, [many]) as kif, kif.using([many.id], []):
        expected, fired = model(ids).logits, kif.fired_rows[many.id]
        request.getfixturevalue("as_on_a_gpu")
        kif.reset()
        assert torch.equal(model(ids).logits, expected)
        assert kif.fired_rows[many.id] == fired
    assert launched == ["detect_kernel", "suppress_kernel"]
    assert fired[0] > 0 == fired[1]
