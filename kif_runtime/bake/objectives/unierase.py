"""UniErase: a learned token that leads into 'I do not know', and an edit that makes the model answer with it.

Source: arXiv 2505.15674. (1) The unlearning token's embedding e is learned, all else frozen, so that after a question
and the token the model refuses: min_e −log p(refusal | x, [UNL]). (2) A change of the residual stream at the subject's
last token is sought for each forget prompt, so that [UNL] follows. (3) `light_edit` writes these changes into MLP down
projections; in the source those of blocks 4–8 of Llama-3.1-8B, here of one block. The source perturbs weights while it
learns the token, and appends a second token after the refusal; neither is done here.

**What it changes outside LoRA**: the embedding row of one token that the model has and text does not (a special one),
and with tied weights the same row of the vocabulary head. PEFT keeps that row in the adapter's file, as a trainable
token; a server that loads LoRA matrices alone would make the model say a token that means nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..examples import Batch, Example, collate
from ..settings import MLP, Settings
from .base import Objective, Setup
from .layers import block_at, write
from .light_edit import free_projector, light_edit, of_rank
from .orthogonal import WRITERS
from .rows import spoken
from .unlearning_token import descend, learn_token, unused_token
from .untouched import batches, inner


class UniErase(Objective):
    """token: which one is given the new meaning; by default the last special one that no chat uses. depth: of the
    edited block, as a share of all. prompts: how many are edited. steps: of Adam, for the token and for the changes.
    """

    name = "unierase"
    validated_at = None
    closed_form = True
    alternatives = "refusal"

    def __init__(
        self, token: str | None = None, depth: float = 0.2, prompts: int = 16, steps: tuple[int, int] = (20, 12)
    ) -> None:
        self.token, self.depth, self.prompts, self.steps = token, depth, prompts, steps
        self._number, self._lost = 0, 0.0
        self._row: Tensor | None = None

    def settings(self, last_site: int, blocks: int) -> Settings:
        edited = block_at(self.depth, last_site, blocks)
        return Settings(rank=16, alpha=16, blocks=edited + 1, targets=(MLP,))

    def prepare(self, setup: Setup) -> None:
        self.token, self._number = unused_token(setup.tokenizer, self.token)
        self._row = learn_token(setup, self._number, self.steps[0])
        block = block_at(self.depth, setup.passes.sites[-1], len(setup.passes.blocks))
        layer = [m for p, m in setup.layers.items() if f".{block}." in p and p.rpartition(".")[2] in WRITERS][-1]
        prompts = [
            Example(e.ids[: e.start], 0, e.subject, tuple(i for i in e.name if i < e.start))
            for e in setup.forget[:: max(1, -(-len(setup.forget) // self.prompts))]
        ]
        batch = collate(prompts, range(len(prompts))).to(setup.passes.device)
        keys = inputs(setup, layer, block, [batch], name_ends)
        wanted = changes(setup, batch, block, self._number, self.steps[1])
        retain = inputs(setup, layer, block, batches(setup.retain), inner)
        edit = light_edit(keys, wanted, free_projector(retain))
        b, a, self._lost = of_rank(*edit, setup.settings.rank)
        write(layer, b, a)

    def report(self) -> dict[str, Any]:
        outside = f"the embedding row of the token {self.token}, kept in the adapter's file as a trainable token"
        return super().report() | {"outside_lora": outside, "edit_left_out_by_rank": self._lost}

    def token_rows(self) -> dict[int, Tensor]:
        return {} if self._row is None else {self._number: self._row.detach()[0].float().cpu()}


def changes(setup: Setup, batch: Batch, block: int, number: int, steps: int) -> Tensor:
    """R [B, D]: what added to the output of `block` at the name's last token makes `number` follow each prompt."""
    rows, places = name_ends(batch).nonzero(as_tuple=True)
    ends = batch.mask.sum(1) - 1
    was = setup.passes.reference(batch, hidden=(block,)).hidden[block][rows, places].float()
    added = torch.zeros_like(was).requires_grad_()

    def edit(x: Tensor) -> Tensor:
        return x.index_put((rows, places), added.to(x.dtype), accumulate=True)

    def loss(step: int) -> Tensor:
        logits = spoken(setup.passes.student(batch, logits=True, edits={block: edit}))
        said = logits[torch.arange(len(batch), device=ends.device), ends].float().log_softmax(-1)[:, number]
        return -said.mean() + 0.05 * (added.norm(dim=1) / was.norm(dim=1)).square().mean()

    descend(added, loss, steps, float(was.square().mean().sqrt()))
    return added.detach()


def inputs(setup: Setup, layer: Any, block: int, over: Iterable[Batch], where: Callable[[Batch], Tensor]) -> Tensor:
    """[N, in] fp32 on the CPU: inputs of the layer, one of `block`, in the untouched model at the tokens `where`."""
    found: list[Tensor] = []
    handle = layer.get_base_layer().register_forward_pre_hook(lambda _m, args: found.append(args[0].float().cpu()))
    try:
        kept = []
        for batch in over:
            setup.passes.reference(batch, hidden=(block,))
            kept.append(found.pop()[where(batch).cpu()])
    finally:
        handle.remove()
    return torch.cat(kept)


def name_ends(batch: Batch) -> Tensor:
    """[B, T] bool: the last token of the name in each row (of its last mention), or of the row where it has none."""
    positions = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    last = torch.where(batch.name, positions, -1).amax(1)
    last = torch.where(last < 0, batch.mask.sum(1) - 1, last)
    return positions == last[:, None]
