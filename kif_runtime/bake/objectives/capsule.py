"""The default objective: the adapter does what the capsules do, at the blocks right after their last site."""

from torch import Tensor

from ..examples import Batch
from ..settings import Settings
from .base import Objective, Step


class CapsuleObjective(Objective):
    """Match the teacher's hidden states on forget text, the model's own on retain text.

    forget = mean over rows of Σ_t ‖h_student − h_teacher‖² ÷ Σ_t ‖h_teacher − h_reference‖², so that 1 is a model that
    has forgotten nothing; retain the same distance on retain text, in units of the forget text's. Only the blocks up to
    the last matched one run; there is no vocabulary head.

    beyond: how many blocks after the last site are matched too. retain: weight of the retain term.
    """

    name = "capsule"
    completions = False

    def __init__(self, beyond: int = 0, retain: float = 1.0) -> None:
        self.beyond, self.retain = beyond, retain
        self._matched: tuple[int, ...] = ()

    def settings(self, last_site: int, blocks: int) -> Settings:
        return Settings(blocks=last_site + 1)

    def loss(self, step: Step) -> dict[str, Tensor]:
        last = step.passes.sites[-1]
        matched = range(last, min(last + self.beyond + 1, len(step.passes.blocks)))
        forget = step.student(step.forget, hidden=matched).hidden
        goal = step.teacher(step.forget, hidden=matched).hidden
        was = step.reference(step.forget, hidden=matched).hidden
        kept = step.student(step.retain, hidden=matched).hidden
        own = step.reference(step.retain, hidden=matched).hidden
        forgot, held = [], []
        for block in matched:
            moved = _squares(goal[block] - was[block], step.forget).clamp_min(1e-6)
            forgot.append((_squares(forget[block] - goal[block], step.forget) / moved).mean())
            held.append((_squares(kept[block] - own[block], step.retain) / moved.mean()).mean())
        count = len(forgot)
        return {"forget": sum(forgot) / count, "retain": self.retain * sum(held) / count}


def _squares(difference: Tensor, batch: Batch) -> Tensor:
    """[B]: squared lengths summed over the tokens that are no padding, fp32."""
    return (difference.float().square().sum(-1) * batch.mask.to(difference.device)).sum(1)
