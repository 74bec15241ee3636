"""One site in a worker: the forward that is put there, for eager and for compiled models."""

import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from kif_kernels import SiteTensors, add_norm_suppress_, listed, suppress_, suppress_normed_

from .batch import Batch


class Site:
    """Site `block`. `batch` says which capsule set each token has; `tensors` are the bank's.

    witness: None, or a list to which every call appends (the sum [K, D], what it became [K, D], rows [K]) of the tokens
    that `watched` chooses, given rows [N]; of all where that is None.
    needed: whether any set of the running batch has a signature here; where none has, there is nothing to look for.
    seconds: time spent here, on the CPU.
    """

    def __init__(self, block: int, tensors: SiteTensors, batch: Batch) -> None:
        self.block, self.tensors, self.batch = block, tensors, batch
        self.witness: list[tuple[Tensor, Tensor, Tensor]] | None = None
        self.watched: Callable[[Tensor], Tensor] | None = None
        self.needed = True
        self.seconds = 0.0

    def suppress(self, x: Tensor) -> None:
        """x [N, D], the sum itself: suppress it in place."""
        if self._skipped():
            return
        start = time.perf_counter()
        rows, hits = self.batch.of(x.shape[0])
        seen = self._seen(rows)
        before = None if seen is None else x[seen]
        suppress_(x, rows, self.tensors, hits, listed(x, rows, self.tensors, self.batch.buffers))
        self._end(start, seen, before, x, rows)

    def add_norm(self, hidden: Tensor, residual: Tensor, weight: Tensor, epsilon: float, one_plus: bool) -> None:
        """residual ← suppress(hidden + residual), hidden ← its norm: the fused form, in place."""
        start = time.perf_counter()
        rows, hits = self.batch.of(hidden.shape[0])
        seen = self._seen(rows)
        before = None if seen is None else hidden[seen] + residual[seen]
        found = listed(hidden, rows, self.tensors, self.batch.buffers, residual=residual)
        add_norm_suppress_(
            hidden, residual, rows, self.tensors, weight, epsilon, one_plus=one_plus, hits=hits, candidates=found
        )
        self._end(start, seen, before, residual, rows)

    def after_norm(self, normed: Tensor, residual: Tensor, weight: Tensor, epsilon: float, one_plus: bool) -> None:
        """The exact form: stock vLLM has made both; only tokens that fire are edited, in place, in both."""
        if self._skipped():
            return
        start = time.perf_counter()
        rows, hits = self.batch.of(residual.shape[0])
        seen = self._seen(rows)
        before = None if seen is None else residual[seen]
        found = listed(residual, rows, self.tensors, self.batch.buffers)
        suppress_normed_(
            normed, residual, rows, self.tensors, weight, epsilon, one_plus=one_plus, hits=hits, candidates=found
        )
        self._end(start, seen, before, residual, rows)

    def _skipped(self) -> bool:
        return not self.needed and self.witness is None

    def _seen(self, rows: Tensor) -> Tensor | None:
        """Which tokens the witness wants; None where there is no witness."""
        if self.witness is None:
            return None
        return torch.arange(len(rows), device=rows.device) if self.watched is None else self.watched(rows)

    def _end(self, start: float, seen: Tensor | None, before: Tensor | None, after: Tensor, rows: Tensor) -> None:
        self.seconds += time.perf_counter() - start
        if self.witness is not None and seen is not None and before is not None:
            self.witness.append((before, after[seen], rows[seen]))


def put_exact(module: nn.Module, site: Site, *, norm: bool) -> None:
    """For eager models: the stock computation runs, then tokens that fire are edited."""
    stock = module.forward

    def around_norm(self: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        normed, residual = stock(x, residual)
        site.after_norm(normed, residual, self.weight, self.variance_epsilon, _adds_one(self))
        return normed, residual

    def around_block(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = stock(*args, **kwargs)
        site.suppress(x)
        return x

    module.__dict__["forward"] = MethodType(around_norm if norm else around_block, module)


def put_compiled(module: nn.Module, name: str, *, norm: bool) -> None:
    """For compiled models: one op, that the graph keeps; it finds its site by `name`, as attention layers do."""
    from vllm.utils.torch_utils import _encode_layer_name

    from . import ops

    ops.register()
    stock, layer = module.forward, _encode_layer_name(name)

    def around_norm(self: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        torch.ops.kif_vllm.add_norm_(x, residual, self.weight, self.variance_epsilon, one_plus, layer)
        return x, residual

    def around_block(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = stock(*args, **kwargs)
        torch.ops.kif_vllm.suppress_(x, layer)
        return x

    one_plus = _adds_one(module)
    module.__dict__["forward"] = MethodType(around_norm if norm else around_block, module)


def _adds_one(norm: nn.Module) -> bool:
    """Gemma's norm multiplies by 1 + weight, in fp32."""
    return type(norm).__name__ == "GemmaRMSNorm"
