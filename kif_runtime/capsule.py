"""A capsule: what is needed to suppress one subject in one model, in one file.

The file is safetensors, F32 throughout, with one JSON metadata entry `kif`. A capsule is sensitive: a detector can be
decoded into the name it looks for. Files are written with mode 0600.
"""

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from . import capsule_checks, capsule_file
from .errors import CapsuleError
from .files import atomic_write, shown
from .ids import mark, opaque_id, slug

__all__ = ["Capsule", "Signature", "opaque_id", "slug"]


@dataclass(frozen=True, eq=False)
class Signature:
    """One subject at one site. All tensors are F32 and not to be changed in place.

    detector [D] and bias [] decide, on the RMS-normalised residual; basis [r, D] has orthonormal rows, 1 <= r <= 64;
    target [r] is where the projection is moved to; strength [] in [0, 1] says how much of the way. `k` and `tau` belong
    to the soft gate and are None for the hard one. `calibration` holds plain JSON, see `kif_runtime.calibration`.
    """

    site: int
    role: str
    detector: Tensor
    bias: Tensor
    basis: Tensor
    target: Tensor
    strength: Tensor
    gate: str = "hard"
    k: float | None = None
    tau: float | None = None
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.basis.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The five tensors by the names they have in the file."""
        return {name: getattr(self, name) for name in capsule_file.TENSORS}


@dataclass(frozen=True, eq=False)
class Capsule:
    """One subject's signatures for one model, with how they were found and how well they do.

    `model` is the model's fingerprint, `width` its D, `blocks` its number of decoder blocks. `name` and `aliases` are
    for display and stay empty when the subject is private.
    """

    id: str
    signatures: tuple[Signature, ...]
    model: str
    width: int
    blocks: int
    operation: str = "project"
    calibration: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[int, ...]:
        """The sites that hold a signature, ascending, each once."""
        return tuple(sorted({s.site for s in self.signatures}))

    def by_site(self, site: int) -> tuple[Signature, ...]:
        """The signatures at `site`, in the order of their numbers, which is the order they apply in."""
        return tuple(s for s in self.signatures if s.site == site)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, which is what a capsule costs to keep resident."""
        return sum(t.nbytes for s in self.signatures for t in s.tensors.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of everything in the capsule; independent of the file it came from and of the device."""
        state = hashlib.sha256(capsule_file.metadata_json(self))
        for signature in self.signatures:
            for tensor in signature.tensors.values():
                values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                state.update(values.astype("u1").tobytes())
        return state.hexdigest()

    @property
    def mark(self) -> Any:
        """What tells its name from others of the same slug (`ids.mark`); None where it does not say."""
        if self.name is not None:
            return mark(self.id, self.name)
        settings = self.provenance.get("settings")
        forms = settings.get("forms") if isinstance(settings, dict) else None
        return forms[0] if isinstance(forms, list) and forms else None

    def validate(self) -> None:
        """Raise CapsuleError, in one line, for anything a capsule may not be."""
        capsule_checks.check(self)

    def check_model(self, model: torch.nn.Module | str) -> None:
        """Raise CapsuleError unless the capsule was made for `model` (a loaded model, or a fingerprint)."""
        capsule_checks.check_model(self, model)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the capsule atomically with mode 0600.

        A capsule of the same subject (id and name) is replaced. Anything else at `path` is refused unless `overwrite`:
        another subject may have the same slug. Capsules of an id that was given, not made of the name, go by that id.
        """
        self.validate()
        if not overwrite and os.path.lexists(path):
            self._refuse_to_replace_another(path)
        atomic_write(path, capsule_file.encode(self), error=CapsuleError)

    def _refuse_to_replace_another(self, path: str | os.PathLike[str]) -> None:
        try:
            there = Capsule.load(path)
        except CapsuleError:
            raise CapsuleError(f"{shown(path)} exists and is not a readable capsule; choose another name") from None
        there.check_subject(self.id, self.mark, path)

    def check_subject(self, id: str | None, mark: Any, path: str | os.PathLike[str]) -> None:
        """Raise CapsuleError unless this capsule, from `path`, is known to be about the subject of `id` and `mark`."""
        if self.id != id or (self.mark is not None and self.mark != mark):
            raise CapsuleError(f"{shown(path)} holds the capsule of another subject; choose another name or id")
        if self.mark != mark:
            raise CapsuleError(
                f"{shown(path)} does not tell whether it is about this subject or one of the same id; "
                "choose another name, or remove it first"
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: torch.nn.Module | str | None = None) -> Self:
        """Read and validate a capsule; with `model` (loaded, or its fingerprint) also check that it is made for it.

        Raises CapsuleError, naming the file, what is wrong and what would mend it, whatever the file holds.
        """
        data = capsule_file.read(path)
        try:
            capsule = cls._from_parts(*capsule_file.decode(data))
            capsule.validate()
            if model is not None:
                capsule.check_model(model)
        except CapsuleError as failure:
            raise CapsuleError(f"{shown(path)}: {failure}") from None
        return capsule

    @classmethod
    def _from_parts(cls, metadata: dict[str, Any], tensors: list[dict[str, Any]]) -> Self:
        described = metadata.pop("signatures")
        signatures = tuple(Signature(**d, **t) for d, t in zip(described, tensors, strict=True))
        return cls(signatures=signatures, **metadata | {"aliases": tuple(metadata["aliases"])})
