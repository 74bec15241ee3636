"""Signatures at an early site for the tokens between a name's first and its last, where they already tell the subject.

Later tokens look back at every token of the name. What its last token is made to say further up does not keep them from
reading the others, nor from having read it before. So these tokens are moved onto a usual name's token, early, before
anybody has read what is known of them. The name's first token is left alone, and all of its first word where others
follow: many other names begin alike, with a first name, a town, "Kingdom", and up to there the model has read the same.
So is the last: moved early, it would look like any name's to the detector further up, which would then fire on those.
"""

import random
import unicodedata

import torch
from torch import Tensor

from ..capsule import Signature
from .control import Control, Level
from .detector import decide, fisher, gram, rank_one
from .reading import Reader, normalised
from .subject import Group, Subject

MOST = 8  # signatures, those of the tokens that occur in most prompts
_FEWEST = 4  # mentions of a token to learn it from
_ELSEWHERE = 24  # other texts that a token is put into
# A token is telling where it is recognised in this share of held-out mentions, and in at most these shares of its
# occurrences elsewhere and of the tokens of names that share its words.
_RECALL, _FIRES_ELSEWHERE, _FIRES_NEAR = 0.9, 0.1, 0.05


def early_signatures(reader: Reader, control: Control, subject: Subject, asked: float) -> list[Signature]:
    """Rank-one signatures at the control's early level, one for each telling token; none where the level is absent."""
    level = control.early
    if level is None:
        return []
    rows = subject.read(reader, level.site)
    tokens = _tokens(reader, subject)
    if not tokens:
        return []
    near = subject.read_near(reader, level.site, rows)
    near_gram = gram(near, level.mean)
    negatives = level.states[control.silent(level.text, subject.forms)].float()
    contexts = _contexts(reader, control)
    made: list[Signature] = []
    for token, places in sorted(tokens.items(), key=lambda item: -len(item[1])):
        if len(places) < _FEWEST or len(made) == MOST:
            break
        raw = torch.stack([rows[i][q] for i, q in places])
        elsewhere = normalised(reader.ends([[*context, token] for context in contexts], level.site))
        group = Group(raw, subject.number[[i for i, _ in places]], elsewhere)
        signature = _signature(level, group, near, near_gram, negatives, asked)
        if signature is not None:
            made.append(signature)
    return made


def _tokens(reader: Reader, subject: Subject) -> dict[int, list[tuple[int, int]]]:
    """By token id, the (prompt, position) of each token after the name's first word and before its last token.

    In a name of one word it is each between the first token and the last. Brackets, hyphens and the like are left out:
    any text is full of them, and control texts show few of their uses.
    """
    batch = reader.encode([p.text for p in subject.prompts])
    found: dict[int, list[tuple[int, int]]] = {}
    for i, (prompt, span) in enumerate(zip(subject.prompts, subject.spans, strict=True)):
        first, *others = prompt.name.split(" ")
        begun = prompt.start + (len(first) if others else 0)
        for q in span[1:-1]:
            start, end = batch.offsets[i, q].tolist()
            if end > begun and any(unicodedata.category(c)[0] not in "PSZ" for c in prompt.text[start:end]):
                found.setdefault(int(batch.ids[i, q]), []).append((i, q))
    return found


def _contexts(reader: Reader, control: Control) -> list[list[int]]:
    """Beginnings of control texts, as token ids."""
    rng = random.Random(0)
    chosen = reader.encode(rng.sample(control.texts, min(_ELSEWHERE, len(control.texts))))
    lengths = [rng.randint(1, min(6, max(1, int(n) - 1))) for n in chosen.lengths]
    return [row[:n].tolist() for row, n in zip(chosen.ids, lengths, strict=True)]


def _signature(
    level: Level, group: Group, near: Tensor, near_gram: Tensor, negatives: Tensor, asked: float
) -> Signature | None:
    """The signature, or None where the token does not tell the subject."""
    train, held = group.split()
    aside = torch.cat([near, group.aside])
    total = near_gram + gram(group.aside, level.mean)
    detector = fisher(train, level.mean, level.scatter, aside, torch.cat([negatives, group.aside]), total)
    decision = decide(detector, held, negatives, aside, asked)

    def share(states: Tensor) -> float:
        return float((decision.detector.scores(states) > 0).float().mean()) if len(states) else 0.0

    too_often = decision.calibration["measured"] > 3 * asked
    if too_often or share(held) < _RECALL or share(group.aside) > _FIRES_ELSEWHERE or share(near) > _FIRES_NEAR:
        return None
    return rank_one(level.site, "early", decision, group.raw.mean(0), level.usual)
