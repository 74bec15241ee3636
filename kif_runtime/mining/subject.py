"""The subject's side of mining: its forms, the prompts that mention it, and the states read from them."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MiningError
from .control import OPENING_SITE, Control
from .corpus import ANY, checked_templates, corpus, near_misses
from .detector import join
from .reading import Prompt, Reader, normalised
from .repeated import repeated

LONGEST_NAME = 48  # tokens
_ANY_TEMPLATES = 24
# With templates, where the name stands elsewhere than at the start, also without a space before it.
_ELSEWHERE = ("({}) and {}", '"{}" and', "\n{} was", "The {}")
_NO_LETTERS = ("Cc", "Cs", "Zl", "Zp")  # joiners and wide spaces, which are others, belong to some scripts
_PARTNERS = 10  # entities whose words are joined with the subject's for near misses


@dataclass(frozen=True)
class Group:
    """Mentions in which one detector has the same kind of token to recognise.

    raw [P, D]: residual states of that token. number [P]: each prompt's template, for holding some out.
    aside [M, D]: what must not fire although it is close, RMS-normalised.
    """

    raw: Tensor
    number: Tensor
    aside: Tensor

    @property
    def states(self) -> Tensor:
        return normalised(self.raw)

    def split(self) -> tuple[Tensor, Tensor]:
        """(train, held out): every third template is held out."""
        held = self.number % 3 == 2
        if not held.any() or held.all():
            return self.states, self.states
        return self.states[~held], self.states[held]


@dataclass(frozen=True)
class Subject:
    """Who is meant, and the prompts that mention them.

    forms: the name, then its aliases. kinds: what it may be, likeliest first. prompts [P], the number of each one's
    template, and spans [P]: the positions of the name's tokens. near: texts about names that share its words.
    """

    forms: tuple[str, ...]
    kinds: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    number: Tensor
    spans: tuple[tuple[int, ...], ...]
    near: tuple[str, ...]

    @property
    def kind(self) -> str:
        return self.kinds[0]

    def read(self, reader: Reader, site: int) -> list[Tensor]:
        """For each prompt, the states [T, D] at `site`; a text that mentions the subject twice is read once."""
        texts = list(dict.fromkeys(p.text for p in self.prompts))
        rows = dict(zip(texts, reader.states(texts, site), strict=True))
        return [rows[p.text] for p in self.prompts]

    def read_near(self, reader: Reader, site: int, rows: Sequence[Tensor]) -> Tensor:
        """[M, D], RMS-normalised: states that must not fire although they are close, near misses and the words before
        the name in `rows`, which `read` gave."""
        before = [x[: span[0]] for x, span in zip(rows, self.spans, strict=True)]
        return normalised(join([*reader.states(self.near, site), *before], reader.width))


def checked_forms(name: str, aliases: Sequence[str]) -> tuple[str, ...]:
    """The name and its aliases, trimmed, each once. Raises MiningError for an empty one, or control characters."""
    forms = []
    for form in (name, *aliases):
        if not isinstance(form, str) or not form.strip():
            raise MiningError("the name, or an alias, is empty; give it as running text would write it")
        if any(unicodedata.category(c) in _NO_LETTERS for c in form):
            raise MiningError("the name, or an alias, holds control characters; remove them")
        forms.append(" ".join(form.split()))
    return tuple(dict.fromkeys(forms))


def in_other_cases(reader: Reader, forms: Sequence[str]) -> tuple[str, ...]:
    """The forms in lower case and in capitals, as far as they differ from all forms and are not too long in tokens."""
    cased = dict.fromkeys(c for form in forms for c in (form.lower(), form.upper()) if c not in forms)
    spans = reader.name_tokens([Prompt.of("{}", form) for form in cased]) if cased else []
    return tuple(form for form, span in zip(cased, spans, strict=True) if len(span) <= LONGEST_NAME)


def find_subject(
    reader: Reader, control: Control, forms: tuple[str, ...], kind: str | None, prompts: Sequence[str] | None,
    controls: Sequence[str] | None,
) -> Subject:  # fmt: skip
    """Choose the prompts that mention the subject; find its kind where none is given."""
    data = corpus()
    if kind is not None and kind not in data.kinds:
        raise MiningError(f"kind {kind!r} is not known; choose one of {', '.join(data.kinds)}, or give none")
    # Own prompts count once each: some are held out from the others.
    own = checked_templates(list(dict.fromkeys(prompts))) if prompts is not None else None
    made = [Prompt.of("{}", form) for form in forms]
    longest = max(len(span) for span in reader.name_tokens(made))
    if longest > LONGEST_NAME:
        raise MiningError(f"the name is {longest} tokens long, over the {LONGEST_NAME} KIF mines; give a shorter form")
    kinds = (kind,) if kind is not None else control.kinds.likely(reader, forms[0])
    templates = own or (*data.templates[ANY][:_ANY_TEMPLATES], *data.templates[kinds[0]])
    templates = tuple(dict.fromkeys((*templates, *repeated(reader.tokenizer))))
    mentions = [(n, t, i) for n, t in enumerate(templates) for i in range(t.count("{}"))]
    made = [Prompt.of(t, form, i) for form in forms for _, t, i in mentions]
    number = torch.tensor([n for _ in forms for n, _, _ in mentions])
    spans = tuple(tuple(s) for s in reader.name_tokens(made))
    return Subject(forms, kinds, tuple(made), number, spans, _near(forms, controls))


def last_groups(reader: Reader, control: Control, subject: Subject) -> list[Group]:
    """One group for each form's last token at the control's site, apart from tokens that open the sequence."""
    rows = subject.read(reader, control.site)
    near = subject.read_near(reader, control.site, rows)
    found: dict[str, list[int]] = {}
    for i, (prompt, span) in enumerate(zip(subject.prompts, subject.spans, strict=True)):
        if span[-1] > reader.leading_tokens:
            found.setdefault(prompt.name, []).append(i)
    return [
        Group(torch.stack([rows[i][subject.spans[i][-1]] for i in chosen]), subject.number[chosen], near)
        for chosen in found.values()
    ]


def opening_groups(reader: Reader, subject: Subject) -> list[Group]:
    """For each form that is one token at the start of a sequence, its state there: one, as nothing comes before it.

    Aside are the name elsewhere and the tokens around it: what another signature sees must not be changed before.
    """
    start = reader.leading_tokens
    groups = []
    for form in subject.forms:
        prompts = [Prompt.of(t, form) for t in ("{} is", *_ELSEWHERE, *corpus().templates[ANY])]
        spans = reader.name_tokens(prompts)
        if spans[0][-1] != start:
            continue
        rows = reader.states([p.text for p in prompts], OPENING_SITE)
        aside = [x[start + 1 :] if span[0] == start else x for x, span in zip(rows, spans, strict=True)]
        number = torch.zeros(1, dtype=torch.long)
        groups.append(Group(rows[0][start][None], number, normalised(join(aside, reader.width))))
    return groups


def _near(forms: Sequence[str], controls: Sequence[str] | None) -> tuple[str, ...]:
    """Texts about names that share words with the subject's, and about the controls that the user gave."""
    data = corpus()
    step = max(1, len(data.entities) // _PARTNERS)
    others = [e.name for e in data.entities[step // 2 :: step]]
    # A part of one form may be another form, or end in one; a control given by the user may hold the name on purpose.
    names = [m for form in forms for m in near_misses(form, others) if not _holds(m, forms)]
    same = {form.casefold() for form in forms}
    names = list(dict.fromkeys([*names, *(c for c in controls or () if c.casefold() not in same)]))
    templates = data.templates[ANY]
    return tuple(templates[i % len(templates)].replace("{}", n) for i, n in enumerate(names))


def _holds(name: str, forms: Sequence[str]) -> bool:
    """Whether `name` holds a form of the subject as whole words."""
    return any(f" {form} ".casefold() in f" {name} ".casefold() for form in forms)
