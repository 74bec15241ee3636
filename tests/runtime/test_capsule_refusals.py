"""Capsule files from anywhere: nothing odd is let in, and every refusal is one line that names the file."""

import json
import math
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capsules import BLOCKS, D, capsule, file_parts, refusal, write_parts
from kif_runtime import Capsule, CapsuleError, capsule_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new-york.kif.safetensors"


# --- files that are not capsules


def test_missing_file_folder_and_pipe_are_refused_without_waiting(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.kif.safetensors")
    assert "folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "regular file" in refusal(tmp_path / "pipe")


def test_a_path_that_is_no_path_is_refused():
    with pytest.raises(CapsuleError):
        Capsule.load("a\0b")


def test_an_oversized_file_is_refused_without_reading(path):
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    assert "67,108,865 bytes" in refusal(path)


@pytest.mark.parametrize(
    "data", [b"", b"1234567", b"\xff" * 8, struct.pack("<Q", 1 << 40) + b"{}", b"#!/bin/sh\necho hi\n"]
)
def test_other_content_is_refused(path, data):
    path.write_bytes(data)
    assert "not a safetensors file" in refusal(path)


def test_another_safetensors_file_is_refused(path):
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    assert "not a capsule" in refusal(path)


def test_every_truncation_is_refused(path):
    capsule().save(path)
    data = path.read_bytes()
    for length in [*range(0, len(data), 41), len(data) - 1]:
        path.write_bytes(data[:length])
        refusal(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"[" * 5000 + b"]" * 5000,
        b'{"__metadata__":' + b'{"a":' * 20000 + b"1" + b"}" * 20000 + b"}",
        b'{"__metadata__":{"kif":3}}',
        b'{"__metadata__":[]}',
        b'{"__metadata__":{"kif":"{}"},"__metadata__":{"kif":"{}"}}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"__metadata__":{"kif":"\xff"}}',
        b'{"__metadata__":{"kif":"{\\"schema\\":1}"},"x":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}',
    ],
)
def test_odd_headers_are_refused(path, header):
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refusal(path)


# --- files that are nearly capsules


def edit(meta: dict, where: str, value: object) -> None:
    """Set `meta[a][0][b]` for where = "a.0.b"; delete it when value is `...`."""
    *path, last = [int(p) if p.isdigit() else p for p in where.split(".")]
    for key in path:
        meta = meta[key]
    if value is ...:
        del meta[last]
    else:
        meta[last] = value


METADATA = [
    ("schema", 2, "newer KIF"),
    ("schema", 10**400, "newer KIF"),
    ("schema", 0, "no schema version"),
    ("schema", True, "no schema version"),
    ("schema", "1", "no schema version"),
    ("schema", ..., "no schema version"),
    ("id", ..., "lacks 'id'"),
    ("id", "", "id is empty"),
    ("id", "New York", "use 'new-york'"),
    ("id", "../x", "use 'x'"),
    ("id", "a\nb", "U+000A"),
    ("id", "a\ud800", "U+D800"),
    ("id", "x" * 200, "longer than"),
    ("id", 7, "not a text"),
    ("id", ["a"], "not a text"),
    ("name", "a\x1b[31mb", "U+001B"),
    ("name", "\u202eevil", "U+202E"),
    ("name", {}, "not a text"),
    ("aliases", "NYC", "not a list"),
    ("aliases", [["NYC"]], "not a text"),
    ("model", "abc", "64 hex"),
    ("model", None, "64 hex"),
    ("width", 0, "width"),
    ("width", 12.0, "width"),
    ("width", 10**30, "width"),
    ("width", 13, "expected [13]"),
    ("blocks", -1, "blocks"),
    ("blocks", None, "blocks"),
    ("operation", "rotate", "unknown operation"),
    ("operation", [1], "unknown operation"),
    ("calibration", [], "not a table"),
    ("provenance", {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": 1}}}}}}}}, "nested too deeply"),
    ("provenance", {"date": "x\x00"}, "U+0000"),
    ("provenance", {"n": 10**400}, "finite"),
    ("extra", 1, "unknown key 'extra'"),
    ("signatures", [], "list of 1"),
    ("signatures", {}, "list of 1"),
    ("signatures", None, "list of 1"),
    ("signatures.0", 3, "not a table"),
    ("signatures.1", ..., "unknown tensor"),
    ("signatures.0.site", ..., "lacks 'site'"),
    ("signatures.0.site", BLOCKS, "site"),
    ("signatures.0.site", -1, "site"),
    ("signatures.0.site", 1.0, "site"),
    ("signatures.0.site", True, "site"),
    ("signatures.0.role", "", "role"),
    ("signatures.0.role", 3, "role"),
    ("signatures.0.gate", "fuzzy", "unknown gate"),
    ("signatures.0.gate", ["hard"], "unknown gate"),
    ("signatures.0.gate", "soft", "k"),
    ("signatures.0.k", 1.0, "hard gate"),
    ("signatures.1.k", 0, "k is not"),
    ("signatures.1.k", "1.6", "k is not"),
    ("signatures.1.tau", None, "tau is not"),
    ("signatures.1.tau", 1e300, "tau is not"),
    ("signatures.0.extra", 1, "unknown key"),
    ("signatures.0.calibration", 1, "not a table"),
    ("signatures.0.calibration.asked", 2, "asked"),
    ("signatures.0.calibration.recall", "high", "recall"),
    ("signatures.0.calibration.tokens", -1, "tokens"),
    ("signatures.0.calibration.tail", {}, "tail needs"),
    ("signatures.0.calibration.tail.scale", -1.0, "tail scale"),
    ("signatures.0.calibration.tail.shape", None, "tail shape"),
    ("signatures.0.calibration.positives", [2, 1], "not sorted"),
    ("signatures.0.calibration.positives", [[1]], "positives"),
    ("signatures.0.calibration.positives", [0] * 34, "at most 33"),
]


@pytest.mark.parametrize(("where", "value", "says"), METADATA)
def test_wrong_metadata_is_refused(path, where, value, says):
    capsule().save(path)
    meta, tensors = file_parts(path)
    edit(meta, where, value)
    write_parts(path, meta, tensors)
    assert says in refusal(path)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"schema":1,"schema":1}', "NaN", "[" * 100000])
def test_metadata_that_is_not_a_json_table_is_refused(path, text):
    capsule().save(path)
    write_parts(path, text, file_parts(path)[1])
    refusal(path)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_not_finite_are_refused(path, literal):
    capsule().save(path)
    meta, tensors = file_parts(path)
    meta["provenance"]["value"] = "@"
    write_parts(path, json.dumps(meta).replace('"@"', literal), tensors)
    refusal(path)


def test_other_metadata_is_refused(path):
    capsule().save(path)
    meta, tensors = file_parts(path)
    write_parts(path, meta, tensors, format="pt")
    assert "unknown metadata" in refusal(path)


def spoiled(t: torch.Tensor, value: float) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[-1] = value
    return t


TENSORS = [
    ("detector", lambda t: spoiled(t, math.nan), "NaN or infinity"),
    ("basis", lambda t: spoiled(t, math.inf), "NaN or infinity"),
    ("bias", lambda t: spoiled(t, -math.inf), "NaN or infinity"),
    ("detector", lambda t: spoiled(t, 3e38), "over 1e+12"),
    ("target", lambda t: spoiled(t, math.nan), "NaN or infinity"),
    ("strength", lambda t: t + 0.01, "not in [0, 1]"),
    ("strength", lambda t: -t, "not in [0, 1]"),
    ("strength", lambda t: t * math.nan, "NaN or infinity"),
    ("basis", lambda t: t * 1.01, "not orthonormal"),
    ("basis", lambda t: t[:1].repeat(2, 1), "not orthonormal"),
    ("basis", lambda t: t * 0, "not orthonormal"),
    ("basis", lambda t: t[:1].clone(), "target has shape [2], expected [1]"),
    ("basis", lambda t: t[:0].clone(), "1 to 64 rows"),
    ("basis", lambda t: t[0].clone(), "1 to 64 rows"),
    ("basis", lambda t: torch.zeros(65, D), "1 to 64 rows"),
    ("basis", lambda t: t[:, :-1].contiguous(), "expected [2, 12]"),
    ("detector", lambda t: t[:-1].clone(), "expected [12]"),
    ("detector", lambda t: t[None], "expected [12]"),
    ("bias", lambda t: t[None], "expected []"),
    ("strength", lambda t: t[None], "expected []"),
    ("detector", lambda t: t.double(), "not F32"),
    ("basis", lambda t: t.bfloat16(), "not F32"),
    ("target", lambda t: t.int(), "not F32"),
    ("target", None, "is missing"),
]


@pytest.mark.parametrize(("name", "change", "says"), TENSORS)
def test_wrong_tensors_are_refused(path, name, change, says):
    capsule().save(path)
    meta, tensors = file_parts(path)
    spoilt = tensors.pop(f"signature.0.{name}")
    if change is not None:
        tensors[f"signature.0.{name}"] = change(spoilt)
    write_parts(path, meta, tensors)
    assert says in refusal(path)


@pytest.mark.parametrize("name", ["extra", "signature.2.detector", "signature.0.k", "a\nb"])
def test_unknown_tensors_are_refused(path, name):
    capsule().save(path)
    meta, tensors = file_parts(path)
    write_parts(path, meta, tensors | {name: torch.zeros(1)})
    assert "unknown tensor" in refusal(path)


def test_what_loading_refuses_validate_refuses_too():
    for change in ({"id": "A b"}, {"width": 13}, {"signatures": ()}, {"aliases": ["x"]}, {"provenance": {"x": {1, 2}}}):
        with pytest.raises(CapsuleError):
            capsule(**change).validate()
    capsule().validate()


def test_a_capsule_too_big_for_its_own_file_format_is_not_written(path):
    with pytest.raises(CapsuleError, match="over what a capsule file may hold"):
        capsule(provenance={"prompts": ["x" * 9999] * 200}).save(path)
    assert not path.exists()


# --- anything at all


GOOD = capsule_file.encode(capsule())


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[str, int, bytes]]:
    kinds = st.sampled_from(["overwrite", "insert", "cut", "end"])
    return draw(st.lists(st.tuples(kinds, st.integers(0, 1 << 14), st.binary(max_size=24)), min_size=1, max_size=6))


def mutate(data: bytes, steps: list[tuple[str, int, bytes]]) -> bytes:
    for kind, at, new in steps:
        at %= len(data) + 1
        if kind == "overwrite":
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        elif kind == "cut":
            data = data[:at] + data[at + len(new) :]
        else:
            data = data[:at]
    return data


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=mutations())
def test_any_mutation_loads_or_is_refused_in_one_line(path, steps):
    path.write_bytes(mutate(GOOD, steps))
    try:
        Capsule.load(path).validate()
    except CapsuleError as refused:
        assert "\n" not in str(refused) and path.name in str(refused)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=_json)
def test_any_json_in_any_field_loads_or_is_refused_in_one_line(path, data, value):
    where = data.draw(st.sampled_from(sorted({w for w, _, _ in METADATA if w != "extra"})))
    path.write_bytes(GOOD)
    meta, tensors = file_parts(path)
    edit(meta, where, value)
    write_parts(path, meta, tensors)
    try:
        Capsule.load(path).validate()
    except CapsuleError as refused:
        assert "\n" not in str(refused) and path.name in str(refused)
