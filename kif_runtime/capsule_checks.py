"""What a capsule may be. Used before writing one and after reading one, so it takes no type for granted."""

import math
import re
import unicodedata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .blocks import decoder_blocks, width
from .errors import CapsuleError
from .files import shown
from .fingerprint import fingerprint
from .ids import MAX_ID_BYTES, slug

if TYPE_CHECKING:
    from .capsule import Capsule, Signature

MAX_RANK = 64
MAX_WIDTH = 1 << 16
MAX_BLOCKS = 1 << 12
MAX_DEPTH = 6
# Far above any real value, far below where an fp32 score or its screening margin could overflow.
MAX_MAGNITUDE = 1e12
# Rows orthonormalised in fp32 are within 1e-6; a basis rounded to bf16 is not within this.
ORTHONORMAL_TOLERANCE = 1e-4

_REMAKE = "mine the subject again"
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_BIDI = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def check(capsule: "Capsule") -> None:
    """Raise CapsuleError for the first thing in `capsule` that is not as it must be."""
    _check_id(capsule.id)
    if type(capsule.model) is not str or not _FINGERPRINT.fullmatch(capsule.model):
        raise CapsuleError(f"the model's fingerprint is not 64 hex digits; {_REMAKE}")
    _check_int(capsule.width, 1, MAX_WIDTH, "width")
    _check_int(capsule.blocks, 1, MAX_BLOCKS, "blocks")
    if capsule.operation != "project":
        raise CapsuleError(
            f"unknown operation {shown(capsule.operation, 40)!r} (known: 'project'); upgrade kif-runtime"
        )
    if capsule.name is not None:
        _check_text(capsule.name, "name")
    if type(capsule.aliases) is not tuple:
        raise CapsuleError("aliases must be a tuple of names")
    for alias in capsule.aliases:
        _check_text(alias, "an alias")
    check_json(capsule.calibration, "calibration")
    check_json(capsule.provenance, "provenance")
    if type(capsule.signatures) is not tuple or not capsule.signatures:
        raise CapsuleError(f"a capsule needs a tuple of at least one signature; {_REMAKE}")
    for n, signature in enumerate(capsule.signatures):
        _check_signature(signature, f"signature {n}", capsule.width, capsule.blocks)


def check_model(capsule: "Capsule", model: "torch.nn.Module | str") -> None:
    """Raise CapsuleError unless `capsule` was made for `model`, a loaded model or a fingerprint."""
    if isinstance(model, str):
        found = model
    else:
        if (d := width(model)) != capsule.width:
            raise CapsuleError(f"made for width {capsule.width}, this model's is {d}; mine the subject on this model")
        if (n := len(decoder_blocks(model))) != capsule.blocks:
            raise CapsuleError(f"made for {capsule.blocks} blocks, this model has {n}; mine the subject on this model")
        found = fingerprint(model)
    if found != capsule.model:
        raise CapsuleError(
            f"made for another model (fingerprint {capsule.model[:12]}, this one is {shown(found, 64)[:12]}); "
            "load that model, or mine the subject on this one"
        )


def check_json(value: Any, what: str) -> None:
    """Raise CapsuleError unless `value` is a table of plain, finite, printable JSON, nested at most MAX_DEPTH deep."""
    if type(value) is not dict:
        raise CapsuleError(f"{what} is not a table; {_REMAKE}")
    _check_json(value, what, MAX_DEPTH)


def _check_json(value: Any, what: str, depth: int) -> None:
    if depth < 0:
        raise CapsuleError(f"{what} is nested too deeply; {_REMAKE}")
    if type(value) is dict:
        for key, item in value.items():
            _check_text(key, f"a key in {what}", limit=200)
            _check_json(item, what, depth - 1)
    elif type(value) in (list, tuple):
        for item in value:
            _check_json(item, what, depth - 1)
    elif type(value) is str:
        _check_text(value, f"a text in {what}", limit=10_000, empty=True)
    elif type(value) in (int, float):
        _check_number(value, f"a number in {what}", -math.inf, math.inf)
    elif value is not None and type(value) is not bool:
        raise CapsuleError(f"{what} holds a {type(value).__name__}, which JSON cannot; use plain numbers and texts")


def _check_id(id: Any) -> None:
    _check_text(id, "id", limit=MAX_ID_BYTES)
    if slug(id) != id:
        raise CapsuleError(f"the id {id!r} is not valid (letters, digits and single '-'); use {slug(id)!r}")


def _check_text(value: Any, what: str, *, limit: int = 1000, empty: bool = False) -> None:
    if type(value) is not str or (not value.strip() and not empty):
        raise CapsuleError(f"{what} is empty or not a text; {_REMAKE}")
    if len(value) > limit:
        raise CapsuleError(f"{what} is longer than {limit} characters; shorten it")
    for c in value:
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _BIDI:
            raise CapsuleError(f"{what} holds the control character U+{ord(c):04X}; remove it")


def _check_int(value: Any, low: int, high: int, what: str) -> None:
    if type(value) is not int or not low <= value <= high:
        raise CapsuleError(f"{what} is not a whole number from {low} to {high}; {_REMAKE}")


def _check_number(value: Any, what: str, low: float, high: float) -> None:
    finite = -(2**63) < value < 2**63 if type(value) is int else type(value) is float and math.isfinite(value)
    if not finite or not low <= value <= high:
        raise CapsuleError(f"{what} is not a finite number in its range; {_REMAKE}")


def _check_signature(signature: "Signature", what: str, width: int, blocks: int) -> None:
    _check_int(signature.site, 0, blocks - 1, f"{what}: site")
    _check_text(signature.role, f"{what}: role", limit=60)
    _check_gate(signature, what)
    rank = signature.basis.shape[0] if isinstance(signature.basis, Tensor) and signature.basis.ndim == 2 else 0
    if not 1 <= rank <= MAX_RANK:
        raise CapsuleError(f"{what}: basis must have 1 to {MAX_RANK} rows of {width}; {_REMAKE}")
    shapes = {"detector": (width,), "bias": (), "basis": (rank, width), "target": (rank,), "strength": ()}
    for name, shape in shapes.items():
        _check_tensor(getattr(signature, name), shape, f"{what}: {name}")
    if not 0 <= signature.strength.item() <= 1:
        raise CapsuleError(f"{what}: strength is {signature.strength.item():.4g}, not in [0, 1]; {_REMAKE}")
    basis = signature.basis.detach().double()
    error = (basis @ basis.T - torch.eye(rank, dtype=basis.dtype, device=basis.device)).abs().max().item()
    if not error <= ORTHONORMAL_TOLERANCE:
        raise CapsuleError(f"{what}: basis rows are not orthonormal (off by {error:.2g}); {_REMAKE}")
    _check_calibration(signature.calibration, f"{what}: calibration")


def _check_gate(signature: "Signature", what: str) -> None:
    if signature.gate not in ("hard", "soft"):
        known = "known: 'hard', 'soft'"
        raise CapsuleError(f"{what}: unknown gate {shown(signature.gate, 40)!r} ({known}); upgrade kif-runtime")
    if signature.gate == "hard":
        if signature.k is not None or signature.tau is not None:
            raise CapsuleError(f"{what}: a hard gate has no k and no tau; {_REMAKE}")
        return
    _check_number(signature.k, f"{what}: k", 1e-6, 1e6)
    _check_number(signature.tau, f"{what}: tau", -1e6, 1e6)


def _check_tensor(value: Any, shape: tuple[int, ...], what: str) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        raise CapsuleError(f"{what} is not an F32 tensor; {_REMAKE}")
    if tuple(value.shape) != shape:
        raise CapsuleError(f"{what} has shape {list(value.shape)}, expected {list(shape)}; {_REMAKE}")
    if not torch.isfinite(value).all():
        raise CapsuleError(f"{what} holds NaN or infinity; {_REMAKE}")
    if value.abs().max().item() > MAX_MAGNITUDE:
        raise CapsuleError(f"{what} holds values over {MAX_MAGNITUDE:.0e}; {_REMAKE}")


def _check_calibration(calibration: Any, what: str) -> None:
    """The keys that the bank computes with must be what it expects; others may be any plain JSON."""
    check_json(calibration, what)
    for key in ("asked", "measured", "recall"):
        if key in calibration:
            _check_number(calibration[key], f"{what}: {key}", 0, 1)
    if "tokens" in calibration:
        _check_number(calibration["tokens"], f"{what}: tokens", 0, 2**62)
    if "tail" in calibration:
        tail = calibration["tail"]
        if type(tail) is not dict or set(tail) != {"threshold", "rate", "shape", "scale"}:
            raise CapsuleError(f"{what}: tail needs just threshold, rate, shape and scale; {_REMAKE}")
        _check_number(tail["threshold"], f"{what}: tail threshold", -MAX_MAGNITUDE, MAX_MAGNITUDE)
        _check_number(tail["rate"], f"{what}: tail rate", 0, 1)
        _check_number(tail["shape"], f"{what}: tail shape", -100, 100)
        _check_number(tail["scale"], f"{what}: tail scale", 0, MAX_MAGNITUDE)
    if "positives" in calibration:
        positives = calibration["positives"]
        if type(positives) is not list or len(positives) > 33:
            raise CapsuleError(f"{what}: positives is not a list of at most 33; {_REMAKE}")
        for value in positives:
            _check_number(value, f"{what}: positives", -MAX_MAGNITUDE, MAX_MAGNITUDE)
        if positives != sorted(positives):
            raise CapsuleError(f"{what}: positives are not sorted; {_REMAKE}")
