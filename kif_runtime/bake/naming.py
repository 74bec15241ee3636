"""The names that texts about a capsule's subject hold: given, stored, or its id, spelt as the capsule recognises it."""

from collections.abc import Sequence
from typing import Any

from ..capsule import Capsule
from ..errors import BakingError, MiningError
from ..evaluation.firing import watching
from ..evaluation.thresholds import hits_on
from ..ids import is_opaque
from ..mining.corpus import ANY, corpus
from ..mining.reading import Prompt, Reader, undisturbed
from ..mining.subject import checked_forms, in_other_cases

RECOGNISED = 0.9  # of the sentences about a name, before it is taken for the subject's
_ASKED = 8  # sentences about a form that is known: in one of them at least the capsule fires
_SHORT = 3  # letters of a word within a name that may be small: of, the, bin


def forms_of(model: Any, tokenizer: Any, capsule: Capsule, given: Sequence[str] = ()) -> tuple[str, ...]:
    """The subject's name and aliases: those given, else those stored, else the id's spelling; a capsule that was mined
    in any case has each in other cases, too. The model's adapter, if it has one, is off meanwhile.

    Raises BakingError where no name is known, or the capsule fires in no sentence about one: the teacher would do
    nothing there, so that nothing would be forgotten and yet nothing be left to forget; also where capsules are
    attached to the model, which would be taken for its own states.
    """
    try:
        with undisturbed(model):
            reader = Reader(model, tokenizer, batch_tokens=1 << 30)
            forms = tuple(given) or ((capsule.name, *capsule.aliases) if capsule.name else _spelt(reader, capsule))
            if not forms:
                raise BakingError(
                    f"capsule {capsule.id!r} holds no name, its id spells none that it recognises, and texts that name "
                    "the subject are what is baked from; give it with --name, or mine with --with-name"
                )
            forms = checked_forms(forms[0], forms[1:])
            for number, form in enumerate(forms):
                if _recognised(reader, capsule, form, _ASKED, anywhere=True) == 0.0:
                    which = "the name" if number == 0 else f"alias {number}"
                    raise BakingError(
                        f"capsule {capsule.id!r} fires in no sentence about {which} given for it; give it as it was "
                        "mined, or mine it as an alias"
                    )
            settings = capsule.provenance.get("settings")
            any_case = isinstance(settings, dict) and bool(settings.get("any_case"))
            return (*forms, *in_other_cases(reader, forms)) if any_case else forms
    except MiningError as failure:
        raise BakingError(str(failure)) from None


def _spelt(reader: Reader, capsule: Capsule) -> tuple[str, ...]:
    """The spelling of the id on whose last token the capsule fires in most sentences; none under RECOGNISED of them,
    and for a private id."""
    if is_opaque(capsule.id):
        return ()
    shares = {name: _recognised(reader, capsule, name) for name in spellings(capsule.id)}
    best = max(shares, key=shares.__getitem__)
    return (best,) if shares[best] >= RECOGNISED else ()


def spellings(id: str) -> tuple[str, ...]:
    """How running text may write the words of an id, likeliest first."""
    words = id.split("-")
    title = [word[:1].upper() + word[1:] for word in words]
    inside = range(1, len(words) - 1)
    inner = [word if i in inside and len(word) <= _SHORT else title[i] for i, word in enumerate(words)]
    found = [" ".join(inner), " ".join(title), "-".join(title), " ".join(words).upper(), " ".join(words)]
    return tuple(dict.fromkeys(found))


def _recognised(
    reader: Reader, capsule: Capsule, name: str, most: int | None = None, *, anywhere: bool = False
) -> float:
    """The share of control sentences about `name`, of the first `most`, in which the capsule fires on its last token;
    anywhere: or on any other."""
    prompts = [Prompt.of(t, name) for t in corpus().templates[ANY] if t.count("{}") == 1][:most]
    try:
        spans = reader.name_tokens(prompts)
    except MiningError:  # the tokenizer has nothing for this spelling
        return 0.0
    with watching(reader.model, [capsule], apply=True) as firing:
        hits = hits_on(reader, firing, [p.text for p in prompts])
        found = [bool(hit.any() if anywhere else hit[span[-1]]) for hit, span in zip(hits, spans, strict=True)]
    return sum(found) / len(found)
