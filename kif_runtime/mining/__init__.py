"""Mining: from a name to a capsule."""

from .api import METHODS, mine
from .batch import BatchReport, mine_batch
from .control import Control
from .preparing import prepare
from .sites import SiteScore, best_site, validate_sites

__all__ = [
    "METHODS", "BatchReport", "Control", "SiteScore", "best_site", "mine", "mine_batch", "prepare", "validate_sites",
]  # fmt: skip
