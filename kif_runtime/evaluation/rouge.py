"""ROUGE-L as two benchmarks compute it: TOFU's (longest common subsequence of stems) and RWKU's (union of sentences).

Source: Lin, ROUGE: A package for automatic evaluation of summaries (2004).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import KifError
from .stemming import stem

_LONG = 3  # shorter words are their own stems


@dataclass(frozen=True)
class Rouge:
    precision: float
    recall: float

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def rouge_l(reference: str, text: str) -> Rouge:
    """ROUGE-L of `text` against `reference`: runs of a-z and 0-9 in lower case, words of over 3 letters stemmed.

    Zero where either has no word. Equals Google's rouge_score with use_stemmer=True, which TOFU's evaluations use.
    """
    wanted, got = _words(reference), _words(text)
    if not wanted or not got:
        return Rouge(0.0, 0.0)
    common = len(_common(wanted, got))
    return Rouge(common / len(got), common / len(wanted))


def _words(text: str) -> list[str]:
    return [stem(word) if len(word) > _LONG else word for word in re.findall(r"[a-z0-9]+", text.lower())]


def rouge_l_union(reference: str, text: str) -> Rouge:
    """Summary-level ROUGE-L over sets of words, case and all: what the Python package `rouge` gives, as RWKU uses it.

    Sentences end at full stops. Words are split at white space. For each sentence of the reference the union of its
    common subsequences with all sentences of `text` counts, and a word counts once. Raises KifError where either holds
    no sentence, as that package fails there: give what stands for no answer instead.
    """
    wanted, got = _sentences(reference), _sentences(text)
    if not wanted or not got:
        raise KifError("ROUGE-L needs a sentence on either side; give a word that stands for no answer")
    union: set[str] = set()
    for sentence in wanted:
        for other in got:
            union |= set(_common(sentence, other))
    words_wanted, words_got = {w for s in wanted for w in s}, {w for s in got for w in s}
    return Rouge(len(union) / len(words_got), len(union) / len(words_wanted))


def _sentences(text: str) -> list[list[str]]:
    """Words by sentence. An all-blank sentence is one empty word, as in that package."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several, the one found from the end, going up the table on ties."""
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, word in enumerate(a):
        for j, other in enumerate(b):
            same = lengths[i][j] + 1 if word == other else max(lengths[i][j + 1], lengths[i + 1][j])
            lengths[i + 1][j + 1] = same
    i, j, found = len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]
