"""The bytes of a capsule file: safetensors, with one JSON metadata entry `kif`. Trusts nothing it reads."""

import json
import os
import stat
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from .errors import CapsuleError
from .files import reason, shown

if TYPE_CHECKING:
    from .capsule import Capsule

SCHEMA = 1
TENSORS = ("detector", "bias", "basis", "target", "strength")
MAX_FILE_BYTES = 64 << 20
MAX_HEADER_BYTES = 1 << 20
MAX_SIGNATURES = 1024

_REMAKE = "fetch an intact copy or mine the subject again"
_CAPSULE_KEYS = ("id", "model", "width", "blocks", "operation", "calibration", "provenance", "name", "aliases")
_SIGNATURE_KEYS = ("site", "role", "gate", "k", "tau", "calibration")


def metadata_json(capsule: "Capsule") -> bytes:
    """The `kif` entry in canonical form: sorted keys, no spaces, UTF-8."""
    content = {key: getattr(capsule, key) for key in _CAPSULE_KEYS} | {"schema": SCHEMA}
    content["signatures"] = [{key: getattr(s, key) for key in _SIGNATURE_KEYS} for s in capsule.signatures]
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def encode(capsule: "Capsule") -> bytes:
    """The file's bytes; the same capsule always gives the same bytes. The capsule must be valid."""
    tensors = {  # copies, since safetensors refuses tensors that share memory
        f"signature.{n}.{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for n, signature in enumerate(capsule.signatures)
        for name, tensor in signature.tensors.items()
    }
    data = safetensors.torch.save(tensors, metadata={"kif": metadata_json(capsule).decode()})
    if len(data) > MAX_FILE_BYTES or int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES:
        raise CapsuleError(
            f"the capsule needs {len(data):,} bytes, over what a capsule file may hold; "
            "use fewer signatures or a lower rank, or store less in its metadata"
        )
    return data


def read(path: str | os.PathLike[str]) -> bytes:
    """The bytes at `path`, at most MAX_FILE_BYTES of them. Raises CapsuleError where it is no such file."""
    try:
        # Opening without blocking, then looking: a named pipe or a device must neither hang nor be read.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise CapsuleError(f"cannot read {shown(path)}: it is not a regular file; name a capsule file")
            if status.st_size > MAX_FILE_BYTES:
                raise CapsuleError(
                    f"{shown(path)}: {status.st_size:,} bytes, over the {MAX_FILE_BYTES:,} a capsule may have; "
                    "it is not a capsule, name another file"
                )
            return file.read(MAX_FILE_BYTES)
    except (OSError, ValueError, TypeError) as failure:
        raise CapsuleError(f"cannot read {shown(path)}: {reason(failure)}") from None


def decode(data: bytes) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """The capsule's metadata without `schema`, and each signature's tensors. Checks form; meaning is checked later."""
    header = _header(data)
    strings = header.pop("__metadata__", None)
    if not isinstance(strings, dict) or not isinstance(strings.get("kif"), str):
        raise CapsuleError("a safetensors file without a 'kif' entry; it is not a capsule, name another file")
    if set(strings) != {"kif"}:
        raise CapsuleError(f"unknown metadata beside 'kif'; {_REMAKE}")
    metadata = _capsule_metadata(_parse(strings["kif"], "the 'kif' entry"))
    count = len(metadata["signatures"])
    _check_tensor_table(header, count)
    return metadata, _tensors(data, count)


def _header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise CapsuleError(f"truncated, or not a safetensors file ({len(data):,} bytes); {_REMAKE}")
    header = _parse(data[8 : 8 + length], "the header")
    if not isinstance(header, dict):
        raise CapsuleError(f"the header is not a table; {_REMAKE}")
    return header


def _parse(text: str | bytes, what: str) -> Any:
    def refuse(value: object) -> None:
        raise ValueError(value)

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice")
        return result

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=table)
    except (ValueError, RecursionError):  # ValueError covers bad UTF-8 and integers too long to convert
        raise CapsuleError(f"{what} is not valid JSON; {_REMAKE}") from None


def _capsule_metadata(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or type(content.get("schema")) is not int or content["schema"] < 1:
        raise CapsuleError(f"the 'kif' entry states no schema version; {_REMAKE}")
    schema = content.pop("schema")
    if schema > SCHEMA:
        theirs = schema if schema < 1000 else "far higher"
        raise CapsuleError(f"written by a newer KIF (schema {theirs}, this one reads {SCHEMA}); upgrade kif-runtime")
    _check_keys(content, (*_CAPSULE_KEYS, "signatures"), "the 'kif' entry")
    signatures = content["signatures"]
    if not isinstance(signatures, list) or not 1 <= len(signatures) <= MAX_SIGNATURES:
        raise CapsuleError(f"'signatures' is not a list of 1 to {MAX_SIGNATURES}; {_REMAKE}")
    for n, signature in enumerate(signatures):
        _check_keys(signature, _SIGNATURE_KEYS, f"signature {n}")
    if not isinstance(content["aliases"], list):
        raise CapsuleError(f"'aliases' is not a list; {_REMAKE}")
    return content


def _check_keys(content: Any, wanted: tuple[str, ...], what: str) -> None:
    if not isinstance(content, dict):
        raise CapsuleError(f"{what} is not a table; {_REMAKE}")
    for key in wanted:
        if key not in content:
            raise CapsuleError(f"{what} lacks {key!r}; {_REMAKE}")
    if unknown := sorted(set(content) - set(wanted)):
        raise CapsuleError(f"{what} has an unknown key {shown(unknown[0], 40)!r}; {_REMAKE}")


def _check_tensor_table(header: dict[str, Any], count: int) -> None:
    """Names and dtypes, before anything is allocated; shapes are checked with the rest of the capsule."""
    expected = {f"signature.{n}.{name}" for n in range(count) for name in TENSORS}
    if missing := sorted(expected - set(header)):
        raise CapsuleError(f"tensor {missing[0]} is missing; {_REMAKE}")
    if unknown := sorted(set(header) - expected):
        raise CapsuleError(f"unknown tensor {shown(unknown[0], 60)!r}; {_REMAKE}")
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.get("dtype") != "F32":
            raise CapsuleError(f"tensor {name} is not F32; {_REMAKE}")


def _tensors(data: bytes, count: int) -> list[dict[str, Tensor]]:
    try:
        loaded = safetensors.torch.load(data)
    except Exception as failure:  # a third party's parser on bytes of any origin: whatever it raises, the file is bad
        raise CapsuleError(f"not a sound safetensors file ({failure}); {_REMAKE}") from None
    return [{name: loaded[f"signature.{n}.{name}"].clone() for name in TENSORS} for n in range(count)]
