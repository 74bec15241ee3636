"""The published distillation (arXiv 2601.10566).

    L = L_DPO(β .02) + .03 L_UL + .02 L_NTUL + .03 L_KL(anchors) + 5 L_EWC

y⁻ is the base model's own answer. y⁺, there a canned refusal, is by default the capsule's own suppressed generation;
a pair whose two answers are the same teaches nothing and counts 0. Published with r = 4, α = 8 on q, v and o, lr 5e-6,
5 epochs, batches of 2 and as many anchors; here the steps are fewer and the learning rate larger.

Published, v is projected out at MLP outputs during the student's forward on subject pairs. With `project` the student
reads them with the capsules at work instead: at block outputs, gated, towards the capsule's target. It is off by
default: a loss that the capsule has already made small teaches the weights little.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import BakingError
from ..examples import Batch, Example, collate
from ..settings import Settings
from .base import Objective, Setup, Step
from .paper_terms import ewc, fisher, name_unlikelihood, unlikelihood
from .preference import dpo
from .rows import alternative, held_rows, reference_logits, spoken
from .tokens import mean_log_prob, sequence_log_prob

BENIGN = 16  # retain texts that the Fisher is taken of
COMMON = 0.05  # share of retain texts from which on a token in them is no name's own


class KifPaper(Objective):
    """alternatives: `teacher` or `refusal`, what y⁺ is. project: see above. The rest: β and the terms' weights."""

    name = "kif-paper"
    validated_at = None

    def __init__(
        self,
        alternatives: str = "teacher",
        project: bool = False,
        beta: float = 0.02,
        unlikelihood: float = 0.03,
        names: float = 0.02,
        anchors: float = 0.03,
        ewc: float = 5.0,
    ) -> None:
        if alternatives not in ("teacher", "refusal"):
            raise BakingError(f"alternatives={alternatives!r} is not known to kif-paper; choose 'teacher' or 'refusal'")
        self.alternatives, self.project, self.beta = alternatives, project, beta
        self.unlikelihood, self.names, self.anchors, self.ewc = unlikelihood, names, anchors, ewc
        self._names: dict[int, frozenset[int]] = {}
        self._start: dict[str, Tensor] = {}
        self._fisher: dict[str, Tensor] = {}

    def settings(self, last_site: int, blocks: int) -> Settings:
        return Settings(rank=4, alpha=8, targets=("q_proj", "v_proj", "o_proj"), learning_rate=1e-3, steps=60)

    def prepare(self, setup: Setup) -> None:
        self._names = telling_tokens(setup.forget, setup.retain)
        self._start = {name: p.detach().clone() for name, p in setup.adapter.items()}
        self._fisher = fisher(_benign_losses(setup), setup.adapter)

    def loss(self, step: Step) -> dict[str, Tensor]:
        batch, plus = step.forget, alternative(step.forget)
        edits = step.passes.suppression() if self.project else None
        rejected, chosen = (spoken(step.student(b, logits=True, edits=edits)) for b in (batch, plus))
        up, down = (_gain(step, b, own) for b, own in ((plus, chosen), (batch, rejected)))
        names = name_mask(batch.subject, self._names, rejected.shape[-1]).to(rejected.device)
        telling = differ(batch, plus)
        unlikely = unlikelihood(rejected, batch.ids, batch.completion)
        unnamed = name_unlikelihood(rejected, names, batch.completion)
        return {
            "dpo": (telling * dpo(up, down, self.beta)).mean(),
            "unlikelihood": self.unlikelihood * (telling * unlikely).mean(),
            "names": self.names * (telling * unnamed).mean(),
            "anchors": self.anchors * held_rows(step).mean(),
            "ewc": self.ewc * ewc(step.adapter, self._start, self._fisher),
        }


def _gain(step: Step, batch: Batch, own: Tensor) -> Tensor:
    was = sequence_log_prob(reference_logits(step, batch), batch.ids, batch.completion)
    return sequence_log_prob(own, batch.ids, batch.completion) - was


def telling_tokens(forget: Sequence[Example], retain: Sequence[Example]) -> dict[int, frozenset[int]]:
    """Subject → the tokens of its name that are rare in retain text: to forbid ' of' would harm all text."""
    seen = Counter(token for example in retain for token in set(example.ids))
    common = {token for token, texts in seen.items() if texts > COMMON * len(retain)}
    found: dict[int, set[int]] = {}
    for example in forget:
        found.setdefault(example.subject, set()).update(example.ids[place] for place in example.name)
    return {subject: frozenset(tokens - common) for subject, tokens in found.items()}


def name_mask(subjects: Tensor, names: Mapping[int, frozenset[int]], vocabulary: int) -> Tensor:
    """[B, 1, V] bool: True at the name tokens of each row's subject [B]."""
    mask = torch.zeros(len(subjects), 1, vocabulary, dtype=torch.bool)
    for row, subject in enumerate(subjects.tolist()):
        mask[row, 0, list(names.get(subject, ()))] = True
    return mask


def differ(batch: Batch, other: Batch) -> Tensor:
    """[B] fp32: 1 for rows whose two texts are not the same, else 0."""
    width = max(batch.ids.shape[1], other.ids.shape[1])
    rows = [pad(torch.where(b.mask.bool(), b.ids, -1), (0, width - b.ids.shape[1]), value=-1) for b in (batch, other)]
    return (rows[0] != rows[1]).any(1).float()


def _benign_losses(setup: Setup) -> Iterable[Tensor]:
    """The training loss [] of retain texts, one after another."""
    stride = max(1, len(setup.retain) // BENIGN)
    for number in range(0, len(setup.retain), stride):
        batch = collate([setup.retain[number]], [number]).to(setup.passes.device)
        logits = spoken(setup.passes.student(batch, logits=True))
        yield -mean_log_prob(logits, batch.ids, batch.completion)[0]
