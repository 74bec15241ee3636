"""Running something around one module's forward, and leaving the module as it was.

An instance attribute `forward` and no forward hook: torch.compile guards on the first but, by default, not on hooks. A
graph compiled before capsules were attached would go on unsuppressed, and one compiled while they were, after them.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

Around = Callable[["Wrapped", tuple[Any, ...], dict[str, Any]], Any]


def wrapped(module: nn.Module) -> bool:
    """Whether `module` has a `Wrapped` forward now."""
    return isinstance(getattr(module.__dict__.get("forward"), "__self__", None), Wrapped)


class Wrapped:
    """A module whose forward is `around(self, args, kwargs)` until `restore`; `inner` is the forward it had."""

    suppresses = True  # by this, mining refuses a model under suppression without knowing this room

    def __init__(self, module: nn.Module, around: Around, site: int = -1) -> None:
        self.module, self.around, self.site = module, around, site
        self.inner: Callable[..., Any] = module.forward
        self.own = (
            "forward" in module.__dict__
        )  # someone else's wrapper (accelerate's, for example) is put back, not dropped
        self.method = MethodType(_forward, self)  # a method, unlike a closure, follows a deepcopy of the model
        module.__dict__["forward"] = self.method

    def restore(self) -> None:
        """Give the module its forward back. Where another wrapper was put over this one since, only pass through."""
        self.around = _pass_through
        if self.module.__dict__.get("forward") is not self.method:
            return
        if self.own:
            self.module.__dict__["forward"] = self.inner
        else:
            del self.module.__dict__["forward"]


def _forward(self: Wrapped, *args: Any, **kwargs: Any) -> Any:
    return self.around(self, args, kwargs)


def _pass_through(wrapped: Wrapped, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return wrapped.inner(*args, **kwargs)
