"""KIF's operator, a folder per op. It knows tensors only: no subject, no model, no file.

Letters, the same in every docstring: N tokens, B batch rows, T positions, D width; S signature slots, R rank and C
capsules of a bank; M capsule-set rows, L the longest set.
"""

from .add_norm_suppress import add_norm_suppress_, suppress_normed_
from .detect import candidate_buffers, detect, listed
from .layout import Candidates, KernelError, SiteTensors
from .suppress import scores, suppress, suppress_

__all__ = [
    "Candidates",
    "KernelError",
    "SiteTensors",
    "add_norm_suppress_",
    "candidate_buffers",
    "detect",
    "listed",
    "scores",
    "suppress",
    "suppress_",
    "suppress_normed_",
]
