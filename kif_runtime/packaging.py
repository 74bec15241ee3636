"""The version of the installed distribution."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version


def version() -> str:
    """The version of kif-runtime, or `unknown` where it runs from a bare checkout."""
    try:
        return _version("kif-runtime")
    except PackageNotFoundError:
        return "unknown"
