"""Subject ids: readable slugs for public subjects, random bits for private ones."""

import hashlib
import re
import secrets
import unicodedata
from collections.abc import Sequence

from .errors import CapsuleError
from .files import shown

MAX_ID_BYTES = 120  # with the suffix and a temporary's name it stays under every file system's 255


def slug(name: str) -> str:
    """The id of a public subject: NFKC, lower case, runs of anything but letters, marks and digits become one '-'.

    Letters of every script stay. Raises CapsuleError where nothing is left. Two names may share a slug; whoever stores
    capsules refuses the second.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", str(name)).lower())
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else "-" for c in text)
    short = "-".join(filter(None, kept.split("-"))).encode()[:MAX_ID_BYTES]
    result = short.decode("utf-8", "ignore").strip("-")
    if not result:
        raise CapsuleError(f"the name {shown(name)!r} has no letter or digit to make an id from; give an id")
    return result


def opaque_id() -> str:
    """The id of a private subject: 128 random bits in hex, never a function of the name."""
    return secrets.token_hex(16)


def is_opaque(id: str) -> bool:
    """Whether an id has the form of a private subject's, and so tells nothing of a name."""
    return re.fullmatch("[0-9a-f]{32}", id) is not None


def marks(id: str, forms: Sequence[str]) -> list[str] | None:
    """The mark of each form of a name; None where the id does not spell the name, which a mark lets one guess."""
    try:
        if slug(forms[0]) != id:
            return None
    except CapsuleError:
        return None
    return [mark(id, form) for form in forms]


def mark(id: str, form: str) -> str:
    """What tells a form of a name from others of the same slug: 64 bits in hex."""
    return hashlib.sha256(f"{id}\0{' '.join(form.split())}".encode()).hexdigest()[:16]
