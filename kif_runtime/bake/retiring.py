"""Whether an adapter does a capsule's work."""

from collections.abc import Sequence
from typing import Any

from ..capsule import Capsule
from ..mining.subject import checked_forms
from . import validation
from .data import Subject, held_out
from .passes import Passes


def left(model: Any, tokenizer: Any, capsule: Capsule, forms: Sequence[str]) -> dict[str, float]:
    """`validation.answers` of a PEFT model whose adapter is on, on the held-out prompts about the subject: what is left
    of the distance to the answers that the capsule gives, 0 to 1, and how far those about others moved, in its unit."""
    subject = Subject(capsule, checked_forms(forms[0], forms[1:]))
    forget, retain = held_out(tokenizer, [subject])
    return validation.answers(Passes(model, [capsule]), forget, retain)
