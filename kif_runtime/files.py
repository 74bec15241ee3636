"""Writing files so that a reader sees the old content or the new, never a half."""

import errno
import os
import stat
import tempfile
from pathlib import Path

from .errors import KifError, one_line


def atomic_write(path: str | os.PathLike[str], data: bytes, *, error: type[KifError] = KifError) -> None:
    """Put `data` at `path` with mode 0600: temporary file in the same folder, fsync, rename, fsync of the folder.

    Whatever goes wrong, Ctrl-C included, leaves no temporary file and the previous content as it was.
    Raises `error` where the folder is missing or not writable, the disk is full, or `path` is not a regular file.
    """
    target = Path(path)
    if os.path.basename(os.fspath(path)) in ("", ".", ".."):
        raise error(f"cannot write {shown(path)!r}: it names no file; add a file name")
    try:
        if os.path.lexists(target) and not target.is_symlink() and not stat.S_ISREG(os.lstat(target).st_mode):
            raise error(f"cannot write {shown(path)}: it is not a regular file; choose another name")
        _replace(target, data)
    except (OSError, ValueError) as failure:
        raise error(f"cannot write {shown(path)}: {reason(failure)}") from failure


def _replace(target: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".kif-", suffix=".tmp", dir=target.parent)  # mkstemp's mode is 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # some systems cannot open a folder; the rename itself is done
    try:
        os.fsync(handle)
    except OSError:
        pass  # nor can some network file systems sync one
    finally:
        os.close(handle)


def reason(failure: Exception) -> str:
    """What an OSError means, and what would mend it."""
    if not isinstance(failure, OSError):
        return f"{failure}; choose another name"
    advice = {
        errno.ENOENT: "no such file or folder; check the path, or create the folder first",
        errno.ENOTDIR: "a part of the path is a file; choose another folder",
        errno.EACCES: "permission denied; choose a place you may use, or change its mode",
        errno.EPERM: "not permitted; choose a place you may use",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.ENOSPC: "the disk is full; free some space, nothing was written",
        errno.EDQUOT: "the disk quota is used up; free some space, nothing was written",
        errno.EFBIG: "the file would be over the allowed size; raise the limit, nothing was written",
        errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
        errno.EISDIR: "it is a folder; name a file",
    }
    return advice.get(failure.errno or 0, failure.strerror or type(failure).__name__)


def shown(path: object, limit: int = 160) -> str:
    """A path as messages show it: one line, and the end of it where it is very long."""
    text = one_line(os.fspath(path) if isinstance(path, os.PathLike) else path, limit=4096)
    return text if len(text) <= limit else "…" + text[-limit + 1 :]
