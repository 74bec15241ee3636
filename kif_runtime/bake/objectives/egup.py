"""EGUP: how hard each row is forgotten, and where forgetting stops.

Source: arXiv 2508.20443, of which we know: weights grow with a forget sample's similarity to the retain set's mean
embedding (what is entangled needs more effort); a sample's own representation shift lowers its weight; a proxy of the
expected output after unlearning bounds the forgetting softly; it goes with any gradient-based loss. Chosen here: NPO;
a softmax over the forget set; the cosine that is left; a hinge. The proxy is the capsule at work, which is what the
model should say afterwards. An embedding is the mean of the last block's outputs over a text, its first token left out.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..examples import Batch
from .base import Setup, Step
from .preference import npo
from .rows import KL, RowObjective, held_rows, spoken
from .tokens import mean_log_prob
from .untouched import ENOUGH, batches, embedding, inner


class Egup(RowObjective):
    """NPO with a weight for each row, and `bound` · mean of what a row is pushed below the proxy."""

    name = "egup"

    def __init__(
        self, beta: float = 0.1, temperature: float = 0.2, bound: float = 1.0, retain: float = 1.0, held: str = KL
    ) -> None:
        super().__init__(retain, held)
        self.beta, self.temperature, self.bound = beta, temperature, bound
        self._last = 0
        self._entangled = torch.zeros(0)

    def prepare(self, setup: Setup) -> None:
        """Each forget example's entanglement, over the whole set, so that it does not depend on how rows are split."""
        self._last = len(setup.passes.blocks) - 1
        forget, retain = (
            torch.cat([self._embedded(setup, batch) for batch in batches(examples, at_most)])
            for examples, at_most in ((setup.forget, len(setup.forget)), (setup.retain, ENOUGH))
        )
        self._entangled = entanglement(forget, retain, self.temperature)

    def _embedded(self, setup: Setup, batch: Batch) -> Tensor:
        states = setup.passes.reference(batch, hidden=(self._last,)).hidden[self._last]
        return embedding(states.cpu(), inner(batch))

    def loss(self, step: Step) -> dict[str, Tensor]:
        batch, last = step.forget, (self._last,)
        student = step.student(batch, hidden=last, logits=True)
        reference = step.reference(batch, hidden=last, logits=True)
        proxy = step.teacher(batch, logits=True)
        now, before = (embedding(o.hidden[self._last], inner(batch)) for o in (student, reference))
        weights = self._entangled[batch.index.cpu()].to(now.device) * remaining(now, before).detach()
        own, was, allowed = (mean_log_prob(spoken(o), batch.ids, batch.completion) for o in (student, reference, proxy))
        gain = (own - was) * batch.completion[:, 1:].sum(1)
        return {
            "forget": (weights * npo(gain, self.beta)).mean(),
            "bound": self.bound * overshoot(own, allowed).mean(),
            "retain": self.retain * held_rows(step, self.held).mean(),
        }


def entanglement(forget: Tensor, retain: Tensor, temperature: float) -> Tensor:
    """N · softmax(cos(e_i, mean of retain) ÷ temperature) [N], of mean 1. forget [N, D], retain [M, D]: embeddings."""
    near = cosine_similarity(forget, retain.mean(0, keepdim=True))
    return (near / temperature).softmax(0) * len(near)


def remaining(now: Tensor, before: Tensor) -> Tensor:
    """[B] in [0, 1]: the cosine of an embedding [B, D] with the untouched model's, 0 where it has turned away."""
    return cosine_similarity(now, before).clamp_min(0)


def overshoot(student: Tensor, proxy: Tensor) -> Tensor:
    """max(0, log p_proxy(y) − log p(y)) [B] from mean log-probabilities [B]: only pushing below the proxy costs."""
    return (proxy - student).clamp_min(0)
