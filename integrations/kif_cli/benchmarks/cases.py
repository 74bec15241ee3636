"""The fused operator on one shape, and what it is timed beside on a GPU.

In place of a server's fused add and RMSNorm: vLLM's and Liger's kernels, the same in plain torch and compiled. They
suppress nothing. What other interventions launch after such a norm: `add` (a vector per row, in place), `copy` (the
same into another tensor), both compiled to one kernel as theirs are, and `dense` (all slots for all tokens).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from kif_kernels import Candidates, SiteTensors, add_norm_suppress_, detect
from kif_kernels.add_norm_suppress import reference
from kif_kernels.tuned import LONGEST_CHUNK
from kif_runtime.errors import KifError

from .growth import dense
from .measuring import Call

RANK, EPSILON = 2, 1e-6


@dataclass(frozen=True)
class Case:
    """One shape: tensors on the device. `firing`: how many tokens a signature fires on."""

    site: SiteTensors
    hidden: Tensor  # [N, D] bf16
    residual: Tensor  # [N, D] bf16
    weight: Tensor  # [D] bf16
    rows: Tensor  # [N] int32
    candidates: Candidates | None
    firing: int


def case(tokens: int, width: int, signatures: int, firing: bool, device: torch.device | str) -> Case:
    """Random states, and detectors of length 1 that fire on nothing but every hundredth token, where asked for."""
    g = torch.Generator().manual_seed(0)
    hidden, residual = torch.randn(2, tokens, width, generator=g).bfloat16()
    slots = max(1, signatures)
    site = SiteTensors.empty(
        width=width, signatures=slots, rank=RANK, rows=1, set_length=slots, device=device, dtype=torch.bfloat16
    )
    chosen = range(0, tokens if firing and signatures else 0, 100)
    if signatures:
        detector = torch.nn.functional.normalize(torch.randn(slots, width, generator=g), dim=1)
        for n in chosen:
            hidden[n], residual[n] = detector[n % slots] * width**0.5, 0.0
        site.detector.copy_(detector)
        site.bias.fill_(-0.5 * width**0.5)  # half of what a token scores that lies along the detector
        basis = torch.linalg.qr(torch.randn(min(slots, 64), width, RANK, generator=g)).Q.mT
        site.basis.copy_(basis.repeat(-(-slots // len(basis)), 1, 1)[:slots])
        site.strength.fill_(1.0)
        site.owner.copy_(torch.arange(slots))
        site.used.fill_(slots)
        site.write_set(0, range(slots))
        for some in torch.arange(slots, device=device).split(1024):
            site.write_screen(some)
    return Case(
        site, hidden.to(device), residual.to(device), torch.ones(width, dtype=torch.bfloat16, device=device),
        torch.zeros(tokens, dtype=torch.int32, device=device),
        Candidates.empty(tokens, device=device) if signatures > LONGEST_CHUNK else None, len(chosen),
    )  # fmt: skip


def kif(c: Case) -> None:
    if c.candidates is not None:
        detect(c.hidden, c.rows, c.site, c.candidates, residual=c.residual)
    add_norm_suppress_(c.hidden, c.residual, c.rows, c.site, c.weight, EPSILON, candidates=c.candidates)


def eager(c: Case) -> None:
    x = c.hidden.float() + c.residual.float()
    c.residual.copy_(x)
    c.hidden.copy_(reference.norm(x, c.weight, EPSILON, False, c.hidden.dtype))


def compiled(call: Callable[..., object], *arguments: object) -> Call:
    """Each on its own: after eight shapes torch would no longer compile what it still calls compiled."""
    torch.compiler.reset()
    made = torch.compile(call, dynamic=False, fullgraph=True)
    return lambda: made(*arguments)


def norm(hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden.float() + residual.float()
    return reference.norm(x, weight, EPSILON, False, hidden.dtype), x.to(residual.dtype)


def foreign(peer: str, c: Case) -> Call:
    """A kernel of another package's, in place of the server's fused add and norm."""
    module, name = FOREIGN[peer]
    kernel = getattr(import_module(module), name)
    kernel = getattr(kernel, "apply", kernel)  # Liger's is an autograd function
    return lambda: kernel(c.hidden, c.residual, c.weight, EPSILON)


def add(c: Case) -> Call:
    return compiled(lambda x, vectors, rows: x.add_(vectors[rows], alpha=1e-9), *_vectors(c))


def copy(c: Case) -> Call:
    return compiled(lambda x, vectors, rows: torch.add(x, vectors[rows], alpha=1e-9), *_vectors(c))


def _vectors(c: Case) -> tuple[Tensor, Tensor, Tensor]:
    return c.residual, c.site.basis[:, 0].contiguous(), c.rows


def all_slots(c: Case) -> Call:
    x, site = c.residual.float(), replace(c.site, basis=c.site.basis.float())
    return lambda: dense(x, site)


@dataclass(frozen=True)
class Peer:
    """prepare: from a case to the call that is timed. rows: how many [N, D] it has to read or write. by_signatures:
    whether its cost depends on them."""

    prepare: Callable[[Case], Call]
    rows: int = 4
    by_signatures: bool = False


FOREIGN = {
    "vllm": ("vllm._custom_ops", "fused_add_rms_norm"),
    "liger": ("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction"),
}
PEERS: Mapping[str, Peer] = {
    "vllm": Peer(partial(foreign, "vllm")),
    "liger": Peer(partial(foreign, "liger")),
    "eager": Peer(lambda c: lambda: eager(c)),
    "compile": Peer(lambda c: compiled(norm, c.hidden, c.residual, c.weight)),
    "add": Peer(add, rows=2),
    "copy": Peer(copy, rows=2),
    "dense": Peer(all_slots, rows=2, by_signatures=True),
}
KIF = Peer(lambda c: lambda: kif(c), by_signatures=True)


def check(c: Case) -> None:
    """Raise KifError unless the kernels give what the specification gives, to within rounding.

    On copies of the first tokens: few where signatures are many, as the specification takes them one by one.
    """
    few = min(len(c.hidden), 101 if c.candidates is None else 8)
    lists = None if c.candidates is None else c.candidates.first(few)
    ours = Case(c.site, c.hidden[:few].clone(), c.residual[:few].clone(), c.weight, c.rows[:few], lists, c.firing)
    hidden, residual = c.hidden[:few].clone(), c.residual[:few].clone()
    kif(ours)
    reference.add_norm_suppress_(hidden, residual, c.rows[:few], c.site, c.weight, EPSILON)
    for name, got, expected in (("hidden", ours.hidden, hidden), ("residual", ours.residual, residual)):
        if not torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=2**-7):
            raise KifError(f"the kernels' {name} is not what the specification gives on this GPU; nothing was measured")
