"""Every error that a user of KIF can cause. Each message is one line: what is wrong, where, and what would mend it."""

import unicodedata


def one_line(text: object, limit: int = 600) -> str:
    """`text` on one line, fit for a terminal: control and separator characters become spaces, length is bounded."""
    clean = "".join(" " if unicodedata.category(c) in _UNPRINTABLE else c for c in str(text)[: 4 * limit])
    clean = " ".join(clean.split())
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


class KifError(Exception):
    """Base of all KIF errors; catching it catches whatever bad input can cause. The message never holds a newline."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message))


class CapsuleError(KifError):
    """A capsule, or the file it is read from or written to, is not acceptable."""


class ModelError(KifError):
    """A model cannot be found, loaded or understood."""


class BankError(KifError):
    """A capsule bank is full, or cannot hold what it is given."""


class MiningError(KifError):
    """A subject cannot be mined from what was given."""


class RequestError(KifError):
    """A request names capsules or options that are not available."""


class BakingError(KifError):
    """A subject cannot be baked from what was given, or training did not come to a good end."""
