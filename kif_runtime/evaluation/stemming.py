"""Porter's stemmer with the changes of its most used implementation (NLTK's), so that ROUGE scores agree with others'.

Source: Porter, An algorithm for suffix stripping, Program 14(3), 1980; the changes are marked below.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

Rule = tuple[str, str, Callable[[str], bool]]

_IRREGULAR = {  # changed: these words do not follow the rules
    form: stem
    for stem, forms in {
        "sky": ("sky", "skies"),
        "die": ("dying",),
        "lie": ("lying",),
        "tie": ("tying",),
        "news": ("news",),
        "inning": ("innings", "inning"),
        "outing": ("outings", "outing"),
        "canning": ("cannings", "canning"),
        "howe": ("howe",),
        "proceed": ("proceed",),
        "exceed": ("exceed",),
        "succeed": ("succeed",),
    }.items()
    for form in forms
}


@functools.lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """The stem of a word in lower case."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_plural, _participle, _final_y, _long_suffix, _middle_suffix, _short_suffix, _final_e, _double_l):
        word = step(word)
    return word


def _consonant(word: str, i: int) -> bool:
    if word[i] in "aeiou":
        return False
    return word[i] != "y" or i == 0 or not _consonant(word, i - 1)


def _measure(stem: str) -> int:
    """m in [C](VC)^m[V]."""
    kinds = [_consonant(stem, i) for i in range(len(stem))]
    return sum(not before and after for before, after in itertools.pairwise(kinds))


def _has_vowel(stem: str) -> bool:
    return any(not _consonant(stem, i) for i in range(len(stem)))


def _double_consonant(word: str) -> bool:
    return len(word) >= 2 and word[-1] == word[-2] and _consonant(word, len(word) - 1)


def _short(word: str) -> bool:
    """Ends consonant, vowel, consonant other than w, x, y; changed: or is vowel and consonant."""
    n = len(word)
    if n == 2:
        return not _consonant(word, 0) and _consonant(word, 1)
    return (
        n >= 3
        and _consonant(word, n - 3)
        and not _consonant(word, n - 2)
        and _consonant(word, n - 1)
        and word[-1] not in "wxy"
    )


def _some(stem: str) -> bool:
    return _measure(stem) > 0


def _more(stem: str) -> bool:
    return _measure(stem) > 1


def _first(word: str, rules: Sequence[Rule]) -> str:
    """The first rule whose suffix fits decides, whether or not its condition holds."""
    for suffix, new, condition in rules:
        if word.endswith(suffix):
            base = word.removesuffix(suffix)
            return base + new if condition(base) else word
    return word


def _plural(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:  # changed: ties gives tie
        return word[:-1]
    always: Callable[[str], bool] = lambda stem: True  # noqa: E731
    return _first(word, [("sses", "ss", always), ("ies", "i", always), ("ss", "ss", always), ("s", "", always)])


def _participle(word: str) -> str:
    if word.endswith("ied"):  # changed: died gives die, spied gives spi
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _some(word[:-3]) else word
    for suffix in ("ed", "ing"):
        base = word.removesuffix(suffix)
        if base != word and _has_vowel(base):
            return _mended(base)
    return word


def _mended(base: str) -> str:
    if base.endswith(("at", "bl", "iz")):
        return base + "e"
    if _double_consonant(base):
        return base if base[-1] in "lsz" else base[:-1]
    return base + "e" if _measure(base) == 1 and _short(base) else base


def _final_y(word: str) -> str:
    """changed: only after a consonant that is not the first letter (happy, not enjoy, not by)."""
    if word.endswith("y") and len(word) > 2 and _consonant(word, len(word) - 2):
        return word[:-1] + "i"
    return word


def _long_suffix(word: str) -> str:
    if word.endswith("alli") and _some(word[:-4]):  # changed: goes on with what is left
        return _long_suffix(word[:-4] + "al")
    rules: list[Rule] = [
        (old, new, _some)
        for old, new in (
            ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"),
            ("bli", "ble"), ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"),
            ("ation", "ate"), ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"),
            ("ousness", "ous"), ("aliti", "al"), ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful"),
        )
    ]  # fmt: skip
    rules.append(("logi", "log", lambda base: _some(base + "l")))
    return _first(word, rules)


def _middle_suffix(word: str) -> str:
    kept = (("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""))
    return _first(word, [(old, new, _some) for old, new in kept])


def _short_suffix(word: str) -> str:
    before = ("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent")
    after = ("ou", "ism", "ate", "iti", "ous", "ive", "ize")
    ion: Rule = ("ion", "", lambda base: _more(base) and base[-1] in "st")
    return _first(word, [*((s, "", _more) for s in before), ion, *((s, "", _more) for s in after)])


def _final_e(word: str) -> str:
    base = word[:-1]
    if word.endswith("e") and (_more(base) or (_measure(base) == 1 and not _short(base))):
        return base
    return word


def _double_l(word: str) -> str:
    return word[:-1] if word.endswith("ll") and _more(word[:-1]) else word
