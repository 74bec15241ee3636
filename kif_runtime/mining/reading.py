"""Reading a model: residual states at a site, next-token distributions, and both under an edit at some tokens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kif_kernels import suppress

from ..blocks import decoder_blocks, unwrapped, width
from ..capsule import Signature
from ..errors import MiningError
from ..packing import packed

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Prompt:
    """A text with a name in it, `start` being the name's first character."""

    text: str
    name: str
    start: int

    @classmethod
    def of(cls, template: str, name: str, mention: int = 0) -> "Prompt":
        """The template with the name wherever it has `{}`; `start` is that of the given mention."""
        parts = template.split("{}")
        return cls(name.join(parts), name, len(name.join([*parts[: mention + 1], ""])) - len(name))


@dataclass(frozen=True)
class Batch:
    """Right-padded tokens. ids, mask [B, T]; offsets [B, T, 2] in characters; lengths [B]."""

    ids: Tensor
    mask: Tensor
    offsets: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)

    def take(self, rows: Tensor) -> "Batch":
        """Some of the rows, without the padding that only the others needed."""
        longest = int(self.lengths[rows].max())
        return Batch(self.ids[rows, :longest], self.mask[rows, :longest], self.offsets[rows, :longest])


def normalised(x: Tensor) -> Tensor:
    """x / rms(x) along the last dimension, fp32, as the operator scores it."""
    x = x.float()
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@contextmanager
def undisturbed(model: nn.Module, adapted: bool = False) -> Iterator[None]:
    """Inside, the model is in eval mode, records no gradients and uses no adapter; afterwards each module is as it was.

    A capsule belongs to the weights that the fingerprint is of, and adapters do not count there; adapted=True leaves
    the active one on, to find signatures as they are under it. Raises MiningError where capsules are attached: their
    edits would be read as the model's own states.
    """
    for module in model.modules():
        if getattr(getattr(module.__dict__.get("forward"), "__self__", None), "suppresses", False):
            raise MiningError("capsules are attached to the model; detach them first")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), nullcontext() if adapted else _without_adapter(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _without_adapter(model: Any) -> AbstractContextManager[Any]:
    if not hasattr(model, "peft_config"):
        return nullcontext()
    if not callable(getattr(model, "disable_adapter", None)):  # one that transformers alone has loaded
        raise MiningError("the model's adapter cannot be turned off; load the model plainly, and the adapter by PEFT")
    return model.disable_adapter()


class _Reached(Exception):
    """The site's block has run; the rest of the forward is not needed."""


class Reader:
    """A model and its tokenizer, read in batches of texts of similar length. All results are fp32 on the CPU.

    Raises MiningError for a tokenizer that cannot tell where its tokens lie in the text.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_tokens: int = 1536) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise MiningError("the tokenizer cannot tell where tokens lie in a text; use the model's fast tokenizer")
        self.model = model
        self.tokenizer = tokenizer
        self.blocks = decoder_blocks(model)
        self.width = width(model)
        self.device = next(self.blocks.parameters()).device
        self.batch_tokens = batch_tokens
        self.leading_tokens = len(tokenizer("", add_special_tokens=True)["input_ids"])

    def encode(self, texts: Sequence[str]) -> Batch:
        """Tokens of `texts` as the tokenizer gives them by default, padded on the right."""
        rows = [self.tokenizer(t, return_offsets_mapping=True, truncation=False) for t in texts]
        longest = max((len(r["input_ids"]) for r in rows), default=0)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        offsets = torch.zeros(len(rows), longest, 2, dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n] = torch.tensor(row["input_ids"])
            mask[i, :n] = 1
            offsets[i, :n] = torch.tensor(row["offset_mapping"]).reshape(n, 2)
        return Batch(ids, mask, offsets)

    def states(self, texts: Sequence[str], site: int, tick: Callable[[int], None] | None = None) -> list[Tensor]:
        """Residual states at `site` of every token of every text, each [T, D]; blocks after the site do not run."""
        out: list[Tensor | None] = [None] * len(texts)
        for chosen, batch in self._batches(texts):
            x = self._state(batch, site)
            for row, index in enumerate(chosen):
                out[index] = x[row, : int(batch.lengths[row])].clone()
            if tick:
                tick(len(chosen))
        return [x for x in out if x is not None]

    def at(
        self, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]], site: int,
        tick: Callable[[int], None] | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """For each row of token ids, its residual states at `site` in the given places, [places, D]."""
        found: list[Tensor] = []
        longest = max((len(row) for row in rows), default=1)
        for start in range(0, len(rows), step := max(1, self.batch_tokens // longest)):
            some = rows[start : start + step]
            lengths = torch.tensor([len(row) for row in some])
            ids = torch.zeros(len(some), int(lengths.max()), dtype=torch.long)
            for i, row in enumerate(some):
                ids[i, : len(row)] = torch.tensor(row)
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            state = self._state(Batch(ids, mask, ids.new_zeros(*ids.shape, 2)), site)
            found += [x[list(at)] for x, at in zip(state, places[start : start + step], strict=True)]
            if tick:
                tick(len(some))
        return found

    def ends(self, rows: Sequence[Sequence[int]], site: int) -> Tensor:
        """[N, D]: residual states at `site` of the last token of each row of token ids."""
        return torch.cat(self.at(rows, [[len(row) - 1] for row in rows], site))

    def name_tokens(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The positions of the name's tokens in each prompt. Raises MiningError where the name leaves no token."""
        batch = self.encode([p.text for p in prompts])
        return [self.name_span(batch.offsets[i, : int(batch.lengths[i])], p) for i, p in enumerate(prompts)]

    @staticmethod
    def name_span(offsets: Tensor, prompt: Prompt) -> list[int]:
        end = prompt.start + len(prompt.name)
        found = [i for i, (a, b) in enumerate(offsets.tolist()) if a < end and b > prompt.start and b > a]
        if not found:
            raise MiningError("the tokenizer cannot place the name in a prompt; write it as running text would")
        return found

    def next_token(self, batch: Batch) -> Tensor:
        """Log-probabilities [B, V] of the token after each row's last; differentiable where an edit is."""
        ends = batch.lengths - 1
        wanted, place = ends.unique(return_inverse=True)  # logits cost more than the whole forward: ask for these alone
        logits = unwrapped(self.model)(
            input_ids=batch.ids.to(self.device),
            attention_mask=batch.mask.to(self.device),
            use_cache=False,
            logits_to_keep=wanted.to(self.device),
        ).logits
        return logits[torch.arange(len(ends)), place].float().log_softmax(-1).cpu()

    @contextmanager
    def edited(self, site: int, edit: Edit) -> Iterator[None]:
        """Inside, the output of block `site` is replaced by `edit` of it."""

        def hook(_module: nn.Module, _args: object, output: Any) -> Any:
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        handle = self.blocks[site].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def suppressing(self, signatures: Sequence[Signature]) -> Iterator[None]:
        """Inside, these signatures of one site are applied to every token, by the operator that serves."""
        if not signatures:
            yield
            return
        site = packed(signatures, self.device)

        def edit(x: Tensor) -> Tensor:
            return suppress(x, torch.zeros(x.shape[0], dtype=torch.int32, device=x.device), site)

        with self.edited(signatures[0].site, edit):
            yield

    @torch.no_grad()
    def _state(self, batch: Batch, site: int) -> Tensor:
        kept: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            kept.append(x.detach().float().cpu())
            raise _Reached

        base = unwrapped(self.model)
        try:
            with self.edited(site, keep):
                base.base_model(
                    input_ids=batch.ids.to(self.device), attention_mask=batch.mask.to(self.device), use_cache=False
                )
        except _Reached:
            pass
        return kept[0]

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Batch]]:
        """Batches of texts of similar length, at most `batch_tokens` with the padding."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        chosen: list[int] = []
        for index in order:
            longest = max(8, len(texts[index]) // 3)
            if chosen and longest * (len(chosen) + 1) > self.batch_tokens:
                yield chosen, self.encode([texts[i] for i in chosen])
                chosen = []
            chosen.append(index)
        if chosen:
            yield chosen, self.encode([texts[i] for i in chosen])
