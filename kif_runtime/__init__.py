"""KIF's runtime: capsules, banks, mining, baking and evaluation on a model that is already loaded.

Names are imported on first use, so that `import kif_runtime` costs nothing and pulls in neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bank import CapsuleBank
    from .capsule import Capsule, Signature
    from .errors import BakingError, BankError, CapsuleError, KifError, MiningError, ModelError, RequestError
    from .mining import mine
    from .models import load_model

__version__ = "0.1.0"

_HOME = {
    "Capsule": ".capsule",
    "Signature": ".capsule",
    "CapsuleBank": ".bank",
    "load_model": ".models",
    "mine": ".mining",
    "KifError": ".errors",
    "BakingError": ".errors",
    "CapsuleError": ".errors",
    "ModelError": ".errors",
    "BankError": ".errors",
    "MiningError": ".errors",
    "RequestError": ".errors",
}

__all__ = [
    "BakingError",
    "BankError",
    "Capsule",
    "CapsuleBank",
    "CapsuleError",
    "KifError",
    "MiningError",
    "ModelError",
    "RequestError",
    "Signature",
    "load_model",
    "mine",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
