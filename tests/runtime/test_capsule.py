"""Capsules: what goes in comes out, is written whole or not at all, and fits its model."""

import dataclasses
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capsules import BLOCKS, D, capsule, file_parts, refusal, signature
from kif_runtime import Capsule, CapsuleError, Signature
from kif_runtime.capsule import opaque_id, slug
from kif_runtime.ids import marks


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new-york.kif.safetensors"


# --- what goes in comes out


def test_round_trip_keeps_every_field_and_bit(path):
    original = capsule()
    original.save(path)
    loaded = Capsule.load(path)
    for field in dataclasses.fields(Capsule):
        if field.name != "signatures":
            assert getattr(loaded, field.name) == getattr(original, field.name), field.name
    for a, b in zip(original.signatures, loaded.signatures, strict=True):
        for field in dataclasses.fields(Signature):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name
    assert loaded.digest == original.digest


def test_file_holds_the_documented_tensors(path):
    capsule().save(path)
    meta, tensors = file_parts(path)
    assert meta["schema"] == 1
    assert [s["site"] for s in meta["signatures"]] == [1, 3]
    names = {f"signature.{n}.{t}" for n in (0, 1) for t in ("detector", "bias", "basis", "target", "strength")}
    assert set(tensors) == names
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert tensors["signature.0.basis"].shape == (2, D)
    assert tensors["signature.1.bias"].shape == ()


def test_saving_twice_gives_the_same_bytes_and_digest(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    capsule().save(one)
    Capsule.load(one).save(two)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"id": "boston"},
        {"name": None},
        {"provenance": {}},
        {"signatures": (signature(),)},
        {"signatures": (signature(), signature(3, rank=1, seed=2, role="trace"))},
    ],
)
def test_digest_sees_every_change(change):
    assert capsule(**change).digest != capsule().digest


def test_digest_does_not_depend_on_memory_layout():
    s = signature()
    strided = dataclasses.replace(s, basis=s.basis.T.contiguous().T, detector=torch.stack([s.detector] * 2, 1)[:, 0])
    assert not strided.basis.is_contiguous()
    assert capsule(signatures=(strided,)).digest == capsule(signatures=(s,)).digest


def test_sites_and_order():
    c = capsule(signatures=(signature(4, seed=1), signature(1, seed=2), signature(4, seed=3)))
    assert c.sites == (1, 4)
    assert c.by_site(4) == (c.signatures[0], c.signatures[2])
    assert c.by_site(2) == ()


def test_nbytes_counts_all_tensors():
    # per signature: detector D, bias 1, basis r*D, target r, strength 1, four bytes each
    assert capsule().nbytes == 4 * ((D + 1 + 2 * D + 2 + 1) + (D + 1 + D + 1 + 1))


# --- ids


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("France", "france"),
        ("  New   York! ", "new-york"),
        ("AC/DC", "ac-dc"),
        ("ﬁnland", "finland"),
        ("Ｆｒａｎｃｅ", "france"),
        ("Москва", "москва"),
        ("हिन्दी", "हिन्दी"),
        ("../../etc/passwd", "etc-passwd"),
    ],
)
def test_slug(name, expected):
    assert slug(name) == expected


@pytest.mark.parametrize("name", ["", "   ", "--", "!?", "\u200b"])
def test_a_name_without_letters_has_no_slug(name):
    with pytest.raises(CapsuleError, match="no letter or digit"):
        slug(name)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=150))
def test_a_slug_is_its_own_slug_and_a_safe_file_name(name):
    try:
        result = slug(name)
    except CapsuleError:
        return
    assert slug(result) == result
    assert len(result.encode()) <= 120
    assert not set(result) & set("/\\. \n\0:")


def test_opaque_ids_are_random_and_valid(path):
    ids = {opaque_id() for _ in range(50)}
    assert len(ids) == 50
    assert all(len(bytes.fromhex(i)) == 16 for i in ids)
    private = capsule(id=ids.pop(), name=None, aliases=())
    private.save(path)
    assert b"York" not in path.read_bytes()


# --- writing


def test_file_is_for_its_owner_only(path):
    old = os.umask(0)
    try:
        capsule().save(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_same_subject_is_replaced_and_another_is_not(path):
    capsule().save(path)
    again = capsule(provenance={"date": "later"})
    again.save(path)
    assert Capsule.load(path).digest == again.digest
    for other in (capsule(name="New-York"), capsule(id="boston")):
        with pytest.raises(CapsuleError, match="another subject"):
            other.save(path)
    assert Capsule.load(path).digest == again.digest
    capsule(id="boston").save(path, overwrite=True)
    assert Capsule.load(path).id == "boston"


def test_a_subject_that_shares_the_slug_is_told_apart_without_its_name(path):
    def unnamed(forms=None, **changes):
        told = {} if forms is None else {"settings": {"forms": marks("new-york", forms)}}
        return capsule(name=None, aliases=(), provenance=told, **changes)

    ours = unnamed(["New York"])
    ours.save(path)
    unnamed(["New  York", "NYC"]).save(path)
    capsule().save(path)  # which has the name
    ours.save(path)
    for other in (unnamed(["New/York"]), unnamed(), capsule(name="New/York")):
        with pytest.raises(CapsuleError, match="another subject"):
            other.save(path)
    assert Capsule.load(path).digest == ours.digest
    for said in ({}, {"settings": [1]}, {"settings": {"forms": 1}}):  # an old file, or an odd one
        capsule(name=None, aliases=(), provenance=said).save(path, overwrite=True)
        with pytest.raises(CapsuleError, match=r"does not tell .* remove it first"):
            ours.save(path)


def test_a_name_that_the_id_does_not_spell_leaves_no_mark():
    assert marks("subject-17", ["New York"]) is None and marks("x", ["!!"]) is None


def test_a_file_that_is_no_capsule_is_not_replaced(path):
    path.write_text("my notes")
    with pytest.raises(CapsuleError, match="not a readable capsule"):
        capsule().save(path)
    assert path.read_text() == "my notes"


def test_an_invalid_capsule_is_not_written(path):
    with pytest.raises(CapsuleError, match="strength"):
        capsule(signatures=(signature(strength=torch.tensor(1.5)),)).save(path)
    assert not path.exists()


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(path, monkeypatch, step, failure):
    capsule().save(path)
    before = path.read_bytes()

    def fail(*_):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises((CapsuleError, KeyboardInterrupt)) as caught:
            capsule(provenance={}).save(path)
    if isinstance(caught.value, CapsuleError):
        assert "disk is full" in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_write_cut_short_by_the_system_leaves_nothing(path):
    big = capsule(provenance={"notes": ["x" * 9000] * 10})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CapsuleError, match="nothing was written"):
            big.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize(
    "bad", ["missing/x.kif.safetensors", "file/x.kif.safetensors", ".", "folder", "", "n" * 300, "nul\0byte"]
)
def test_unwritable_places_are_named(tmp_path, bad, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CapsuleError) as caught:
        capsule().save(bad, overwrite=True)
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_folder_without_permission_is_named(path, monkeypatch):
    def deny(**_):  # root may write everywhere, so a mode would not do
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", deny)
    with pytest.raises(CapsuleError, match="permission denied"):
        capsule().save(path)


# --- the model it was made for


def test_another_fingerprint_is_refused(path):
    capsule().save(path)
    right = capsule().model
    assert Capsule.load(path, right).id == "new-york"
    assert "another model" in refusal(path, "0" * 64)


def test_width_blocks_and_weights_of_the_model_are_checked(path, tiny_model):
    from kif_runtime.fingerprint import fingerprint

    model = tiny_model("llama", hidden_size=32, num_hidden_layers=BLOCKS)
    wide = torch.eye(32)[:2].contiguous()
    fits = dict(detector=torch.ones(32), basis=wide)
    made_here = capsule(width=32, model=fingerprint(model), signatures=(signature(**fits),))
    made_here.save(path)
    assert Capsule.load(path, model).digest == made_here.digest
    for change, says in [({"blocks": BLOCKS + 1}, "blocks"), ({"model": "0" * 64}, "another model")]:
        dataclasses.replace(made_here, **change).save(path)
        with pytest.raises(CapsuleError, match=says):
            Capsule.load(path, model)
    capsule(model=fingerprint(model)).save(path)
    with pytest.raises(CapsuleError, match="made for width 12, this model's is 32"):
        Capsule.load(path, model)


def test_importing_the_runtime_is_light():
    code = "import kif_runtime, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
