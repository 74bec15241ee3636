"""The bank: what it applies is what the capsules say, whatever came and went before; and its limits hold."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import genpareto

from kif_kernels import scores, suppress_
from kif_runtime.bank import CapsuleBank
from kif_runtime.capsule import Capsule, Signature
from kif_runtime.errors import BankError, KifError, RequestError

WIDTH, SITES = 24, (1, 3)
TENSORS = (
    "detector",
    "bias",
    "k",
    "tau",
    "margin",
    "sketch",
    "step",
    "length",
    "rest",
    "basis",
    "target",
    "strength",
    "owner",
    "used",
    "sets",
    "place",
)


def signature(
    site: int, seed: int, *, rank: int = 2, soft: bool = False, tail: dict[str, float] | None = None
) -> Signature:
    g = torch.Generator().manual_seed(seed)
    return Signature(
        site=site,
        role="last",
        detector=torch.randn(WIDTH, generator=g) / WIDTH**0.5,
        bias=torch.rand((), generator=g) - 0.5,
        basis=torch.linalg.qr(torch.randn(WIDTH, rank, generator=g)).Q.T.contiguous(),
        target=torch.randn(rank, generator=g),
        strength=0.5 + 0.5 * torch.rand((), generator=g),
        **({"gate": "soft", "k": 2.0, "tau": 0.25} if soft else {}),
        calibration={"tail": tail, "positives": [0.1 * i for i in range(33)]} if tail else {},
    )


def capsule(id: str, seed: int = 0, *, sites: Iterable[int] = (1, 1, 3), model: str = "a" * 64, **how: Any) -> Capsule:
    parts = tuple(signature(site, 100 * seed + n, **how) for n, site in enumerate(sites))
    return Capsule(id=id, signatures=parts, model=model, width=WIDTH, blocks=4)


def bank_for(*capsules: Capsule, **options: Any) -> CapsuleBank:
    sizes: dict[str, Any] = {
        "width": WIDTH,
        "sites": SITES,
        "max_signatures": 12,
        "max_rank": 4,
        "max_capsules": 6,
        "max_sets": 4,
    }
    bank = CapsuleBank(**sizes | options)
    bank.add(*capsules)
    return bank


def tokens(n: int = 40) -> torch.Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(9))


def applied(bank: CapsuleBank, row: int, site: int = 1) -> torch.Tensor:
    x = tokens()
    suppress_(x, torch.full((len(x),), row, dtype=torch.int32), bank.site(site))
    return x


def from_the_capsules(capsules: Iterable[Capsule], site: int = 1) -> np.ndarray:
    """The equation in float64, straight from the capsules: ids bytewise, then signature number."""
    out = tokens().double().numpy().copy()
    for n in range(len(out)):
        direction = out[n] / np.sqrt((out[n] ** 2).mean() + 1e-6)
        for c in sorted(capsules, key=lambda c: c.id.encode()):
            for s in c.by_site(site):
                score = s.detector.double().numpy() @ direction + float(s.bias)
                g = float(score > 0) if s.k is None else 1 / (1 + np.exp(-s.k * (score - s.tau)))
                g = g if g >= 2**-10 else 0.0
                basis = s.basis.double().numpy()
                out[n] -= float(s.strength) * g * basis.T @ (basis @ out[n] - s.target.double().numpy())
    return out


def addresses(bank: CapsuleBank) -> list[int]:
    return [getattr(bank.site(block), name).data_ptr() for block in SITES for name in TENSORS]


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_a_row_applies_its_capsules_and_the_mandatory_ones(soft) -> None:
    a, b, c = (capsule(id, seed, soft=soft) for seed, id in enumerate(["a", "b", "c"]))
    bank = bank_for(a, b, c)
    bank.set_mandatory(["b"])
    for ids, meant in (([], [b]), (["a"], [a, b]), (["c", "b"], [b, c])):
        for site in SITES:
            np.testing.assert_allclose(
                applied(bank, bank.row(ids), site).numpy(), from_the_capsules(meant, site), atol=5e-6
            )


def test_updates_go_by_id_bytewise_whatever_the_order_of_arrival() -> None:
    ids = ["b", "Z", "é", "a", "z"]
    capsules = [capsule(id, seed, rank=4) for seed, id in enumerate(ids)]
    first = bank_for(*capsules, max_signatures=20)
    second = bank_for(*reversed(capsules), max_signatures=20)
    expected = from_the_capsules(capsules)
    for bank in (first, second):
        np.testing.assert_allclose(applied(bank, bank.row(ids)).numpy(), expected, atol=5e-6)
    assert torch.equal(applied(first, first.row(ids)), applied(second, second.row(ids[::-1])))
    by_arrival = from_the_capsules([capsule(str(n), seed, rank=4) for n, seed in enumerate(range(5))])
    assert np.abs(by_arrival - expected).max() > 0.1


def test_addresses_and_tensors_stay_while_capsules_come_and_go() -> None:
    bank = bank_for()
    before, sites = addresses(bank), [bank.site(block) for block in SITES]
    bank.add(capsule("a", 1), capsule("b", 2))
    bank.set_mandatory(["a"])
    bank.release(bank.row(["b"]))
    bank.remove("b")
    bank.add(capsule("c", 3))
    assert addresses(bank) == before
    assert [bank.site(block) for block in SITES] == sites
    for block in SITES:
        bank.site(block).check()


def test_removal_moves_slots_but_not_meaning() -> None:
    capsules = {id: capsule(id, seed) for seed, id in enumerate(["a", "b", "c", "d"])}
    bank = bank_for(*capsules.values())
    row, column = bank.row(["d", "b"]), bank.index("d")
    before = applied(bank, row)
    bank.remove("a")
    bank.remove("c")
    assert torch.equal(applied(bank, row), before)
    assert bank.index("d") == column
    hits = torch.zeros(40, 6, dtype=torch.bool)
    suppress_(tokens(), torch.full((40,), row, dtype=torch.int32), bank.site(1), hits)
    assert hits[:, column].any()
    assert set(hits.any(0).nonzero().flatten().tolist()) <= {column, bank.index("b")}
    for block in SITES:
        site = bank.site(block)
        live = int(site.used)
        assert live == sum(len(capsules[id].by_site(block)) for id in "bd")
        assert torch.isneginf(site.bias[live:]).all()
        assert torch.isneginf(scores(tokens(), site)[:, live:]).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), max_size=25))
def test_any_history_leaves_the_same_bank(history) -> None:
    """add/remove in any order; then what is held acts as in a fresh bank, bit for bit."""
    made = {id: capsule(id, seed) for seed, id in enumerate("abcde")}
    bank, start = bank_for(), None
    for id, _ in history:
        if id in bank.capsules:
            bank.remove(id)
        else:
            bank.add(made[id])
        start = start or addresses(bank)
        assert addresses(bank) == start
    held = list(bank.capsules)
    fresh = bank_for(*(made[id] for id in held))
    for site in SITES:
        assert torch.equal(applied(bank, bank.row(held), site), applied(fresh, fresh.row(held), site))


def test_the_same_set_has_the_same_row_until_it_is_released() -> None:
    bank = bank_for(capsule("a", 1), capsule("b", 2), max_sets=2)
    bank.set_mandatory(["a"])
    row = bank.row(["b"])
    assert bank.row(["b", "a", "b"]) == row
    other = bank.row()
    assert other != row
    bank.set_mandatory([])
    with pytest.raises(BankError, match="all 2 capsule sets are in use"):
        bank.row()
    bank.set_mandatory(["a"])
    bank.release(row)
    assert not torch.equal(applied(bank, row), tokens()), "one holder is left"
    bank.release(row)
    assert torch.equal(applied(bank, row), tokens()), "an empty row suppresses nothing"
    assert bank.row(["b"]) == row
    with pytest.raises(BankError, match="not in use"):
        bank.release(3)


def test_mandatory_capsules_cannot_be_left_out_or_slip_out_of_a_set_in_use() -> None:
    bank = bank_for(capsule("a", 1), capsule("b", 2))
    optional = bank.row(["b"])
    with pytest.raises(BankError, match="1 capsule sets in use lack"):
        bank.set_mandatory(["a"])
    assert bank.mandatory == frozenset()
    bank.release(optional)
    bank.set_mandatory(["a"])
    with pytest.raises(BankError, match="is mandatory"):
        bank.remove("a")
    row = bank.row()
    assert not torch.equal(applied(bank, row), tokens())
    bank.set_mandatory([])
    with pytest.raises(BankError, match="part of 1 capsule sets"):
        bank.remove("a")
    bank.release(row)
    bank.remove("a")
    assert list(bank.capsules) == ["b"]


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"max_capsules": 2}, [capsule("c", 3)], "room for 2 capsules"),
        ({"max_signatures": 5}, [capsule("c", 3)], "block 1 has room for 5 signatures"),
        ({"max_signatures": {1: 9, 3: 2}}, [capsule("c", 3)], "block 3 has room for 2 signatures"),
        ({}, [capsule("c", 3, rank=5)], "rank 5, the bank's limit is 4"),
        ({}, [capsule("c", 3, sites=[2])], r"block 2, the bank's sites are \[1, 3\]"),
        ({}, [capsule("a", 3)], "in the bank already"),
        ({}, [capsule("c", 3), capsule("c", 4)], "in the bank already"),
        ({}, [capsule("c", 3, model="b" * 64)], "another model"),
        ({"fingerprint": "a" * 64}, [capsule("c", 3), capsule("d", 4, model="b" * 64)], "another model"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_half_done(options, more, message) -> None:
    bank = bank_for(capsule("a", 1), capsule("b", 2), **options)
    row = bank.row(["a", "b"])
    before = applied(bank, row)
    with pytest.raises(BankError, match=message) as caught:
        bank.add(*more)
    assert "\n" not in str(caught.value)
    assert list(bank.capsules) == ["a", "b"]
    assert torch.equal(applied(bank, row), before)


def test_a_set_longer_than_its_room_is_refused() -> None:
    bank = bank_for(capsule("a", 1), capsule("b", 2), max_set_signatures=3)
    assert bank.site(1).sets.shape == (4, 3)
    bank.row(["a"])
    with pytest.raises(BankError, match=r"4 signatures at block 1, room is for 3 \(max_set_signatures\)"):
        bank.row(["a", "b"])


@pytest.mark.parametrize(
    "options",
    [{"max_sets": 0}, {"max_signatures": 0}, {"max_false_fire": 0.0}, {"max_false_fire": 2}, {"max_capsules": -1}],
)
def test_sizes_that_make_no_bank_are_refused(options) -> None:
    with pytest.raises(BankError):
        bank_for(**options)


def test_unknown_names_are_refused_by_name() -> None:
    bank = bank_for(capsule("a", 1))
    with pytest.raises(RequestError, match="'nobody'"):
        bank.row(["a", "nobody"])
    with pytest.raises(RequestError, match="a list"):
        bank.row("a")
    for call in (bank.remove, bank.index, lambda id: bank.set_mandatory([id])):
        with pytest.raises(BankError, match="'nobody'"):
            call("nobody")
    with pytest.raises(BankError, match="block 2 is no site"):
        bank.site(2)
    with pytest.raises(KifError, match="width 24, the bank is for 32"):
        bank_for(capsule("a", 1), width=32)


def test_a_bank_made_for_its_capsules_is_just_large_enough() -> None:
    capsules = [capsule("a", 1), capsule("b", 2, sites=[1], rank=3)]
    bank = CapsuleBank.for_capsules(capsules, mandatory=["b"], max_sets=3)
    assert bank.sites == SITES
    assert bank.site(1).basis.shape == (3, 3, WIDTH)
    assert bank.site(3).basis.shape == (1, 3, WIDTH)
    assert bank.mandatory == {"b"}
    np.testing.assert_allclose(applied(bank, bank.row(["a"])).numpy(), from_the_capsules(capsules), atol=5e-6)
    with pytest.raises(BankError, match="full"):
        bank.add(capsule("c", 3))
    assert CapsuleBank.for_capsules([], width=WIDTH).sites == ()
    with pytest.raises(BankError, match="width"):
        CapsuleBank.for_capsules([])


def test_thresholds_tighten_with_the_number_held_as_the_tail_says() -> None:
    tails = {"a": (0.2, 0.01, 0.4, -1.2), "b": (-0.3, 0.02, 1.0, -2.0), "c": (0.0, 0.005, 0.3, -0.9)}
    made = [
        capsule(id, seed, sites=[1], tail={"shape": xi, "rate": rate, "scale": beta, "threshold": u})
        for seed, (id, (xi, rate, beta, u)) in enumerate(tails.items())
    ]

    def expected(c: Capsule, held: int) -> float:
        xi, rate, beta, u = tails[c.id]
        return max(0.0, float(genpareto.isf(1e-4 / held / rate, xi, loc=u, scale=beta)))

    bank, free = bank_for(max_false_fire=1e-4), bank_for(*made)
    for held, new in enumerate(made, start=1):
        bank.add(new)
        for slot, c in enumerate(made[:held]):
            shift = expected(c, held)
            assert float(bank.site(1).bias[slot]) == pytest.approx(float(c.signatures[0].bias) - shift, abs=1e-5)
            assert bank.report()[c.id]["shifts"] == [pytest.approx(shift, rel=1e-6)]
    total = sum(
        rate * genpareto.sf(bank.report()[id]["shifts"][0], xi, loc=u, scale=beta)
        for id, (xi, rate, beta, u) in tails.items()
    )
    assert total <= 1e-4 * (1 + 1e-6)
    lost = {id: entry["recall_lost"][0] for id, entry in bank.report().items()}
    for id, entry in bank.report().items():  # positives are evenly spread over 0 to 3.2
        assert lost[id] == pytest.approx(min(1.0, entry["shifts"][0] / 3.2), abs=1e-6)
    assert max(lost.values()) > 0.1
    bank.remove("a")
    bank.remove("b")
    assert bank.report()["c"]["shifts"] == [pytest.approx(expected(made[2], 1), rel=1e-6)]
    assert free.report()["c"] == free.report()["c"] | {"shifts": [0.0], "recall_lost": [0.0], "bytes": made[2].nbytes}


def test_a_capsule_without_a_tail_cannot_be_tightened_and_is_not_taken() -> None:
    bank = bank_for(max_false_fire=1e-4)
    with pytest.raises(BankError, match="'a', signature 0, under max_false_fire: it has no calibration tail"):
        bank.add(capsule("a", 1))
    assert not bank.capsules
    assert bank_for(capsule("a", 1)).report()["a"]["recall_lost"] == [None, None, None]


def test_a_bank_made_in_inference_mode_can_change_outside_it() -> None:
    with torch.inference_mode():
        bank = bank_for(capsule("a", 1))
    bank.add(capsule("b", 2))
    np.testing.assert_allclose(
        applied(bank, bank.row(["a", "b"])).numpy(), from_the_capsules(bank.capsules.values()), atol=5e-6
    )
