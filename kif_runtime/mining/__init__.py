"""Mining: from a name to a capsule."""

from .api import METHODS, mine
from .batch import BatchReport, mine_batch
from .control import Control
from .preparing import prepare

__all__ = ["METHODS", "BatchReport", "Control", "mine", "mine_batch", "prepare"]
