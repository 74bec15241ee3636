"""Attaching capsules to a loaded Hugging Face model: its own computation runs, and only tokens that fire are edited."""

import asyncio
import inspect
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from kif_kernels import Candidates, SiteTensors, candidate_buffers, listed, suppress, suppress_
from kif_runtime.bank import CapsuleBank
from kif_runtime.blocks import decoder_blocks, unwrapped
from kif_runtime.capsule import Capsule
from kif_runtime.errors import ModelError, RequestError

from . import caches, placing
from .choice import Choice, Chooser
from .counting import Tally, finished, real_tokens
from .wrap import Wrapped, wrapped

# Around opening and closing `using` blocks. One for all: a lock of an attachment's own could not follow a deepcopy.
_OPENING = threading.RLock()


def attach(
    model: nn.Module,
    capsules: Iterable[Capsule],
    mandatory: Iterable[Capsule | str] = (),
    *,
    max_false_fire: float | None = None,
    bank: CapsuleBank | None = None,
) -> "Attachment":
    """Suppress `capsules` in every forward of `model` until the attachment is detached or its `with` block ends.

    model: any decoder-only transformers model, bare or inside PEFT or torch.compile. It is changed in place.
    capsules: the default capsule set, replaced inside `using`. mandatory: capsules, or ids among `capsules`, that
    always apply. max_false_fire: largest share of tokens on which any signature may fire; thresholds are tightened
    for it (see CapsuleBank). bank: one on the model's device that holds all of these already, and whose capsules stay
    as they are while attached; its own mandatory set applies too.
    Raises CapsuleError for a capsule of another model, ModelError for a model whose blocks cannot be found or are not
    on one device, RequestError where capsules are attached already, ids clash, or a continuous batching is kept.
    """
    blocks = decoder_blocks(model)
    owner = placing.owner_of(model, blocks)
    if any(wrapped(module) for module in (owner, *blocks)):
        raise RequestError(
            "this model has capsules attached already; detach() those first, or attach all at once and pick by using()"
        )
    caches.refuse_batching(unwrapped(model))
    default, always = placing.named(capsules, mandatory)
    if bank is not None:
        always |= {id: bank.capsules[id] for id in bank.mandatory}
    together = default | always
    placing.check_model(model, list(together.values()))
    device = placing.device_of(blocks, sorted({site for c in together.values() for site in c.sites}))
    if bank is None:
        bank = placing.new_bank(model, together, device, max_false_fire)
    else:
        placing.check_bank(bank, together, device, max_false_fire)
    chooser = Chooser(bank, together, tuple(always), device)
    return Attachment(model, owner, blocks, chooser, tuple(default))


@dataclass
class _Step:
    """One forward of the model: the capsule set of each batch row, what fired, which sites have run (a bit each)."""

    rows: Tensor  # [B] int32
    shape: tuple[int, int]  # B, T
    sites: frozenset[int]  # where any of these sets has a signature
    hits: Tensor  # [B·T, C] bool
    buffers: Candidates | None  # for the site that is running, where any wants them
    ran: int = 0


class Attachment:
    """Capsules attached to a model; a context manager that detaches. Made by `attach`. One forward at a time."""

    def __init__(
        self, model: nn.Module, owner: nn.Module, blocks: nn.ModuleList, chooser: Chooser, default: tuple[str, ...]
    ) -> None:
        bank, capsules = chooser.bank, chooser.capsules
        sites = sorted({site for c in capsules.values() for site in c.sites})
        self._sites: dict[int, SiteTensors] = {site: bank.site(site) for site in sites}
        self._all_ran = sum(1 << site for site in sites)
        self._chooser = chooser
        self._choice = self._default = chooser.choose([default])
        self._open: list[Choice] = []  # of the `using` blocks, innermost last; `_opener` has them open
        self._opener: tuple[int, int] | None = None
        self._columns = {id: bank.index(id) for id in capsules}
        self._tally = Tally(bank.max_capsules, chooser.device)
        self._stop = placing.stop_tokens(unwrapped(model), chooser.device)
        self._step: _Step | None = None
        self._parameters = tuple(inspect.signature(owner.forward).parameters)
        self._blocks = tuple(blocks)
        self._wraps = [Wrapped(blocks[site], self._block, site) for site in sites]
        self._wraps.append(Wrapped(owner, self._forward))

    # -- the public face

    def using(self, *lists: Sequence[str]) -> AbstractContextManager[None]:
        """Inside the block capsules apply as listed, ids per input row, and not the default set: `using(["it"], [])`.

        Mandatory capsules stay on. A batch of n·k rows takes each of n lists k times, as generate repeats rows for
        beams and `num_return_sequences`; any other batch size raises RequestError in the forward.
        Raises RequestError for an unknown id, and where another thread or asyncio task is inside such a block: every
        forward of the model, from whatever thread, runs under the innermost one.
        """
        self._chooser.check(lists)
        return self._using(lists)

    @contextmanager
    def _using(self, lists: tuple[Sequence[str], ...]) -> Iterator[None]:
        if not self._wraps:
            raise RequestError("these capsules are detached; attach them again")
        with _OPENING:
            if self._open and self._opener != _here():
                raise RequestError(
                    "another thread or asyncio task is inside a using() block of this model; enter them one after "
                    "another, or give one list per input row"
                )
            choice = self._choice = self._chooser.choose(lists)
            self._opener = _here()
            self._open.append(choice)
        try:
            yield
        finally:
            with _OPENING:  # it need not be the innermost: the block of a generator ends when that is thrown away
                self._open.remove(choice)
                self._choice = self._open[-1] if self._open else self._default
                self._chooser.release(choice)

    @property
    def fired(self) -> dict[str, int]:
        """Capsule id → tokens on which any of its signatures, at any site, had a gate of at least 1/2, since `reset`.

        Every token that the model computes counts once; padding does not. Without a cache, generate computes all tokens
        anew at each step, and they count anew.
        """
        totals = self._tally.total.tolist()
        return {id: totals[i] for id, i in self._columns.items()}

    @property
    def fired_rows(self) -> dict[str, list[int]]:
        """The same per input row: a number for each list of `using`, or else for each row of the batch.

        Forwards of the same number of rows add up; one with another number begins anew.
        """
        rows = self._tally.rows.t().tolist()
        return {id: rows[i] for id, i in self._columns.items()}

    def reset(self) -> None:
        """Set `fired` and `fired_rows` to zero."""
        self._tally.reset()

    def detach(self) -> None:
        """Leave the model as it was before `attach`. Doing it again does nothing."""
        if not self._wraps:
            return
        while self._wraps:
            self._wraps.pop().restore()
        self._chooser.release(self._default)

    def __enter__(self) -> Self:
        if not self._wraps:
            raise RequestError("these capsules are detached; attach them again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # -- what runs inside the model

    def _forward(self, wrapped: Wrapped, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Around the forward of the module that holds the blocks: everything is checked before anything is computed."""
        if self._step is not None:
            raise RequestError(
                "two forwards of an attached model at once; run them one after another, or copy the model"
            )
        arguments = dict(zip(self._parameters, args, strict=False)) | kwargs
        tokens, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
        inputs = embeddings if tokens is None else tokens
        if inputs is None:
            return wrapped.inner(*args, **kwargs)  # it says itself what is missing
        self._refuse_checkpointing()
        batch, length = inputs.shape[:2]
        choice = self._choice
        rows, key = choice.rows_of(batch), choice.key_of(batch)
        cache = caches.given(arguments)
        continued = cache is not None and caches.check(cache, key)
        real = self._real(arguments.get("attention_mask"), cache, batch, length)
        if continued and length == 1 and batch > 1 and tokens is not None:
            ended = finished(tokens.to(rows.device), self._stop)
            real = ~ended if real is None else real & ~ended
        if cache is not None:
            caches.tag(cache, key)
        hits = torch.zeros(batch * length, self._tally.total.shape[0], dtype=torch.bool, device=rows.device)
        buffers = candidate_buffers(self._sites.values(), batch * length)
        step = self._step = _Step(rows, (batch, length), choice.sites, hits, buffers)
        try:
            output = wrapped.inner(*args, **kwargs)
        finally:
            self._step = None
        if step.ran != self._all_ran:
            missed = [site for site in self._sites if not step.ran >> site & 1]
            raise ModelError(
                f"the model skipped decoder block {missed[0]}, where capsules apply; run it whole, in eval()"
            )
        if (cache := caches.returned(output) or cache) is not None:
            caches.tag(cache, key)
        self._tally.add(hits, real, choice.count if choice.count > 1 else batch)
        return output

    def _block(self, wrapped: Wrapped, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Around the forward of one decoder block: edits its output, in place unless a gradient flows through it."""
        step, site = self._step, wrapped.site
        if step is None:
            raise RequestError(f"decoder block {site} ran outside a forward of its model; detach the capsules for that")
        if step.ran >> site & 1:
            raise ModelError(f"decoder block {site} ran twice in one forward; KIF cannot suppress there")
        step.ran |= 1 << site
        output = wrapped.inner(*args, **kwargs)
        if site not in step.sites:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[:2] != step.shape:
            raise ModelError(
                f"decoder block {site} gave {list(hidden.shape)} for {list(step.shape)} tokens; KIF cannot edit that"
            )
        if hidden.device != step.rows.device:
            raise RequestError(
                f"decoder block {site} is on {hidden.device} now; attach the capsules again after a move"
            )
        tensors, trains = self._sites[site], hidden.requires_grad and torch.is_grad_enabled()
        edited = hidden.detach().clone() if trains else hidden  # where it trains, this one is for the hits alone
        suppress_(edited, step.rows, tensors, step.hits, listed(edited, step.rows, tensors, step.buffers))
        if not trains:
            return output
        edited = suppress(hidden, step.rows, tensors)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _real(self, mask: Any, cache: Any, batch: int, length: int) -> Tensor | None:
        if mask is None:
            return None
        real = real_tokens(mask, batch, length, 0 if cache is None else cache.get_seq_length())
        return None if real is None else real.to(self._tally.total.device)

    def _refuse_checkpointing(self) -> None:
        if torch.is_grad_enabled() and any(
            b.training and getattr(b, "gradient_checkpointing", False) for b in self._blocks
        ):
            raise RequestError(
                "capsules do not apply under gradient checkpointing; call gradient_checkpointing_disable()"
            )


def _here() -> tuple[int, int]:
    """What tells this thread and asyncio task from the others that are running."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        task = None
    return threading.get_ident(), id(task)
