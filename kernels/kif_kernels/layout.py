"""How one site's signatures lie in memory: packed tensors whose addresses never change while signatures come and go."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf, log, sqrt
from typing import Self

import torch
from torch import Tensor

# A soft gate counts as 0 below 2⁻¹⁰. sigmoid(z) ≥ 2⁻¹⁰ is z ≥ −ln 1023, so that this too is decided on a score.
LOG_1023 = log(1023.0)
MAX_RANK, MAX_WIDTH = 64, 1 << 16  # of a capsule file; and what the screening margin is proven for
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class KernelError(ValueError):
    """A tensor given to an operator has the wrong shape, dtype, device or layout."""


@dataclass(frozen=True, eq=False)
class SiteTensors:
    """One site's signatures, packed. All but `used`, `sets` and `place` are indexed by slot; slots used..S-1 are free.

    `bias` of a free slot is -inf, so that it cannot fire whoever looks at it. `k` is inf and `tau` 0 for a hard gate.
    `margin` is `screening_margin`; `sketch`, `step`, `length` and `rest` are `sketched`. `write_screen` writes these
    five; until then `rest` is inf, which rules nothing out. `owner` is the index of the slot's capsule.
    Row m of `sets` lists the slots of capsule set m at this site in canonical order (capsule id bytewise, then
    signature number), -1 after the last. Row m of `place` is its inverse: where in that list each slot stands, -1 for a
    slot that is not in it. `write_set` writes both.
    """

    detector: Tensor  # [S, D] fp32
    bias: Tensor  # [S] fp32
    k: Tensor  # [S] fp32
    tau: Tensor  # [S] fp32
    margin: Tensor  # [S] fp32
    sketch: Tensor  # [S, D] int8
    step: Tensor  # [S] fp32
    length: Tensor  # [S] fp32
    rest: Tensor  # [S] fp32
    basis: Tensor  # [S, R, D] fp32 or the model's dtype; rows past a signature's rank are zero
    target: Tensor  # [S, R] fp32
    strength: Tensor  # [S] fp32
    owner: Tensor  # [S] int32
    used: Tensor  # [1] int32
    sets: Tensor  # [M, L] int32
    place: Tensor  # [M, S] int32

    @classmethod
    def empty(
        cls,
        *,
        width: int,
        signatures: int,
        rank: int,
        rows: int,
        set_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Tensors for `signatures` free slots and `rows` empty capsule sets. `dtype` is the basis's.

        Raises KernelError for sizes that the kernels do not take.
        """

        def full(shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        _check_sizes(width, rank)
        return cls(
            detector=full((signatures, width), 0),
            bias=full((signatures,), -inf),
            k=full((signatures,), inf),
            tau=full((signatures,), 0),
            margin=full((signatures,), 0),
            sketch=full((signatures, width), 0, torch.int8),
            step=full((signatures,), 1),
            length=full((signatures,), 0),
            rest=full((signatures,), inf),
            basis=full((signatures, rank, width), 0, dtype),
            target=full((signatures, rank), 0),
            strength=full((signatures,), 0),
            owner=full((signatures,), -1, torch.int32),
            used=full((1,), 0, torch.int32),
            sets=full((rows, set_length), -1, torch.int32),
            place=full((rows, signatures), -1, torch.int32),
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors in the order of their declaration, which is the order the registered operators take them in."""
        return (
            self.detector, self.bias, self.k, self.tau, self.margin, self.sketch, self.step, self.length, self.rest,
            self.basis, self.target, self.strength, self.owner, self.used, self.sets, self.place,
        )  # fmt: skip

    @property
    def by_slot(self) -> tuple[Tensor, ...]:
        """Those that hold one entry for each slot."""
        return self.tensors[:-3]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def write_set(self, row: int, slots: Sequence[int]) -> None:
        """Make `slots`, in canonical order, the capsule set of `row`. Takes at most L of them, each once."""
        listed = torch.tensor(slots, dtype=torch.int32, device=self.sets.device)
        self.sets[row].fill_(-1)[: len(slots)] = listed
        self.place[row].fill_(-1)[listed.long()] = torch.arange(len(slots), dtype=torch.int32, device=listed.device)

    def write_screen(self, slots: slice | Tensor) -> None:
        """Fill what a screen reads from the detectors, biases and gates of `slots`. After every change of these."""
        detector = self.detector[slots]
        self.margin[slots] = screening_margin(detector, self.bias[slots], self.tau[slots], self.k[slots])
        self.sketch[slots], self.step[slots], self.length[slots], self.rest[slots] = sketched(detector)

    def check(self) -> None:
        """Raise KernelError unless shapes, dtypes, device, layout and sets are as declared. Not for every call."""
        if self.detector.dim() != 2 or self.basis.dim() != 3 or self.sets.dim() != 2 or self.sets.shape[1] == 0:
            raise KernelError("detector must be [S, D], basis [S, R, D] and sets [M, L] with L over 0")
        (slots, width), rank = self.detector.shape, self.basis.shape[1]
        _check_sizes(width, rank)
        shapes: dict[str, tuple[int, ...]] = {
            "detector": (slots, width), "sketch": (slots, width), "basis": (slots, rank, width),
            "target": (slots, rank), "used": (1,), "sets": tuple(self.sets.shape), "place": (self.sets.shape[0], slots),
        }  # fmt: skip
        dtypes = {"basis": FLOATS, "sketch": (torch.int8,)}
        dtypes |= dict.fromkeys(("owner", "used", "sets", "place"), (torch.int32,))
        for name in (f.name for f in fields(self)):
            tensor, shape = getattr(self, name), shapes.get(name, (slots,))
            allowed = dtypes.get(name, (torch.float32,))
            if tuple(tensor.shape) != shape or tensor.dtype not in allowed:
                got = f"{tensor.dtype} {list(tensor.shape)}"
                raise KernelError(f"{name} is {got}, expected {list(shape)} of {' or '.join(map(str, allowed))}")
            if tensor.device != self.detector.device or not tensor.is_contiguous():
                raise KernelError(f"{name} must be contiguous and on {self.detector.device}, where detector is")
        row, place = (self.sets >= 0).nonzero(as_tuple=True)
        slot, inverse = self.sets[row, place].long(), torch.full_like(self.place, -1)
        if (slot >= slots).any():
            raise KernelError(f"sets name slots past the last, {slots - 1}")
        inverse[row, slot] = place.int()
        if not torch.equal(self.place, inverse):
            raise KernelError("place is not the inverse of sets; write capsule sets with write_set")


@dataclass(frozen=True, eq=False)
class Candidates:
    """What `detect` writes and suppression reads: for each of N tokens the signatures that may fire on it.

    `count[n]` is how many there are. `found[n, :count[n]]` says which: places in the capsule set of the token (columns
    of `SiteTensors.sets`), each once, in any order. Where count[n] is over H they did not fit, the token *overflows*,
    its list means nothing and whoever reads it looks at the whole set instead. Entries after the last are undefined.
    `work` is the kernel's own: zeros, and zeros again after every launch. None for who only reads candidates.
    """

    count: Tensor  # [N] int32
    found: Tensor  # [N, H] int32
    work: Tensor | None = None  # [N, 2] int32

    @classmethod
    def empty(cls, tokens: int, *, limit: int = 32, device: torch.device | str = "cpu") -> Self:
        """Buffers for N = `tokens` tokens and lists of H = `limit` signatures, with no candidate yet."""
        shapes: tuple[tuple[int, ...], ...] = ((tokens,), (tokens, limit), (tokens, 2))
        return cls(*(torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes))

    def first(self, tokens: int) -> Self:
        """The same buffers for a step of fewer tokens: views, at the same addresses."""
        return type(self)(self.count[:tokens], self.found[:tokens], None if self.work is None else self.work[:tokens])


def _check_sizes(width: int, rank: int) -> None:
    if not 1 <= rank <= MAX_RANK or not 1 <= width <= MAX_WIDTH:
        raise KernelError(f"rank {rank}, width {width}: expected ranks 1 to {MAX_RANK}, widths 1 to {MAX_WIDTH}")


SITE_ARGUMENTS = ", ".join(f"Tensor {field.name}" for field in fields(SiteTensors))


def gamma(width: int) -> float:
    """γ_n = n·u / (1 − n·u) for fp32, n = width + 32: bounds the relative error of n roundings in any order."""
    n = (width + 32) * 2.0**-24
    return n / (1.0 - n)


def screening_margin(detector: Tensor, bias: Tensor, tau: Tensor, k: Tensor) -> Tensor:
    """How far a screened score may lie below the decided one. detector [S, D]; bias, tau, k [S]; gives [S] fp32.

    Two fp32 scores of the same token are compared: the *screen* w·(x·(1/rms)) + b from a matrix product, in an order
    that depends on the library and the batch, and the *decision* in a fixed order. Let v = x / rms(x), so ‖v‖ ≤ √D,
    and u = 2⁻²⁴.
    - The screen's product, summed in any order: at most γ_D‖w‖‖v‖ by Cauchy-Schwarz. Its rms: a sum of squares has
      relative error γ_D, its root half of that. Mean, epsilon, root, reciprocal, scaling: 8u. Together 1.5·γ_D + 8u.
    - The decision, summed by halves: ⌈log₂D⌉ + 1 roundings in the product, half as many and 4 more in v. With D up to
      2¹⁶ that is under 32u. So both together are under 2·γ_{D+32}, times ‖w‖√D, with room for second-order terms.
    - Bias, τ and ln(1023)/k enter the screen's sum and may be rounded in each of its steps, and a few times in the
      decision: under 2·γ_{D+32}(|b| + |τ| + 7/k).
    The sum is computed here in float64 and rounded up; 1e-30 covers underflow. So a decision to fire implies that
    screen + margin is over the gate's floor.
    """
    width = detector.shape[-1]
    reach = detector.double().norm(dim=-1) * sqrt(width)
    size = reach + bias.double().abs() + tau.double().abs() + 7.0 / k.double()
    return ((2.0 * gamma(width) * size + 1e-30) * (1 + 2.0**-20)).float()


def sketched(detector: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Detectors [S, D] in 8 bits -> sketch q [S, D] int8, step c, length ‖q‖, rest ‖w − c·q‖·√D, all [S] fp32.

    They bound a score from an exact product of whole numbers. For v = x / rms(x) in 8 bits, v = a·p + δ,

        w·v = c·a·(q·p) + c·q·δ + (w − c·q)·v  ≤  c·a·(q·p) + c·‖q‖·‖δ‖ + ‖w − c·q‖·√D

    by Cauchy-Schwarz, twice. Length and rest are computed in float64 and rounded up.
    """
    w = detector.double()
    step = (w.abs().amax(-1) / 127.0).float().clamp_min(1e-30)
    q = (w / step.double().unsqueeze(-1)).round().clamp(-127, 127)
    rest = (w - step.double().unsqueeze(-1) * q).norm(dim=-1) * sqrt(w.shape[-1])
    up = 1 + 2.0**-20
    return q.to(torch.int8), step, (q.norm(dim=-1) * up).float(), (rest * up).float()
