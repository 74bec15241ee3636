"""Whether an adapter does a capsule's work."""

from collections.abc import Sequence
from typing import Any

from ..capsule import Capsule
from . import validation
from .data import Subject, held_out
from .naming import forms_of
from .passes import Passes


def left(model: Any, tokenizer: Any, capsule: Capsule, names: Sequence[str] = ()) -> dict[str, float]:
    """`validation.answers` of a PEFT model whose adapter is on, on the held-out prompts about the subject: what is left
    of the distance to the answers that the capsule gives, 0 to 1, and how far those about others moved, in its unit.

    names: of the subject, for a capsule that stores none. Raises BakingError as `forms_of` does.
    """
    subject = Subject(capsule, forms_of(model, tokenizer, capsule, names))
    forget, retain = held_out(tokenizer, [subject])
    return validation.answers(Passes(model, [capsule]), forget, retain)
