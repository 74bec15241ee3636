"""The name of a public subject whose capsule stores none: its id, spelt as the capsule itself recognises it."""

import re
from typing import Any

from ..capsule import Capsule
from ..errors import MiningError
from ..evaluation.firing import watching
from ..evaluation.thresholds import hits_on
from ..mining.corpus import ANY, corpus
from ..mining.reading import Prompt, Reader, undisturbed

RECOGNISED = 0.9  # of the sentences about a name, before it is taken for the subject's
_OPAQUE = re.compile(r"[0-9a-f]{32}")
_SHORT = 3  # letters of a word within a name that may be small: of, the, bin


def spelt(model: Any, tokenizer: Any, capsule: Capsule) -> str | None:
    """The spelling of the id on whose last token the capsule fires in most sentences; None under RECOGNISED of them,
    and for a private id. The model's adapter, if it has one, is off meanwhile, and it is left as it was."""
    if _OPAQUE.fullmatch(capsule.id):
        return None
    with undisturbed(model):
        reader = Reader(model, tokenizer, batch_tokens=1 << 30)
        shares = {name: _recognised(reader, capsule, name) for name in spellings(capsule.id)}
    best = max(shares, key=shares.__getitem__)
    return best if shares[best] >= RECOGNISED else None


def spellings(id: str) -> tuple[str, ...]:
    """How running text may write the words of an id, likeliest first."""
    words = id.split("-")
    title = [word[:1].upper() + word[1:] for word in words]
    inside = range(1, len(words) - 1)
    inner = [word if i in inside and len(word) <= _SHORT else title[i] for i, word in enumerate(words)]
    found = [" ".join(inner), " ".join(title), "-".join(title), " ".join(words).upper(), " ".join(words)]
    return tuple(dict.fromkeys(found))


def _recognised(reader: Reader, capsule: Capsule, name: str) -> float:
    """The share of control sentences about `name` in which the capsule fires on its last token."""
    prompts = [Prompt.of(t, name) for t in corpus().templates[ANY] if t.count("{}") == 1]
    try:
        spans = reader.name_tokens(prompts)
    except MiningError:  # the tokenizer has nothing for this spelling
        return 0.0
    with watching(reader.model, [capsule], apply=True) as firing:
        hits = hits_on(reader, firing, [p.text for p in prompts])
        found = [bool(hit[span[-1]]) for hit, span in zip(hits, spans, strict=True)]
    return sum(found) / len(found)
