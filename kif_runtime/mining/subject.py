"""The subject's side of mining: its forms, the prompts that name it, and the states read from them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MiningError
from .control import OPENING_SITE, Control
from .corpus import ANY, Corpus, checked_templates, corpus, near_misses
from .detector import join
from .reading import Prompt, Reader, normalised

LONGEST_NAME = 48  # tokens
_ANY_TEMPLATES = 24
# With templates, where the name stands elsewhere than at the start, also without a space before it.
_ELSEWHERE = ("({}) and {}", '"{}" and', "\n{} was", "The {}")
_PARTNERS = 10  # entities whose words are joined with the subject's for near misses


@dataclass(frozen=True)
class Group:
    """Prompts whose name ends in the same kind of token, so that one detector may do for them.

    raw [P, D]: residual states of the name's last token. number [P]: each prompt's template, for holding some out.
    role: `last`, or `first` where the whole name is the sequence's first token; that is read at OPENING_SITE.
    aside [M, D]: for `first`, what must not fire: RMS-normalised states of the name elsewhere and of tokens around it.
    """

    role: str
    raw: Tensor
    number: Tensor
    aside: Tensor | None = None

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
    """What was read about the subject: groups of positives, and near misses [M, D], RMS-normalised."""

    forms: tuple[str, ...]
    kind: str
    groups: tuple[Group, ...]
    near: Tensor


def checked_forms(name: str, aliases: Sequence[str]) -> tuple[str, ...]:
    """The name and its aliases, trimmed, each once. Raises MiningError for an empty or unprintable one."""
    forms = []
    for form in (name, *aliases):
        if not isinstance(form, str) or not form.strip():
            raise MiningError("the name, or an alias, is empty; give it as running text would write it")
        if not form.isprintable():
            raise MiningError("the name, or an alias, holds control characters; remove them")
        forms.append(" ".join(form.split()))
    return tuple(dict.fromkeys(forms))


def read_subject(
    reader: Reader, control: Control, forms: tuple[str, ...], kind: str | None, prompts: Sequence[str] | None,
    controls: Sequence[str] | None,
) -> Subject:  # fmt: skip
    """Read the subject and its near misses at the control's site; find its kind where none is given."""
    data = corpus()
    if kind is not None and kind not in data.kinds:
        raise MiningError(f"kind {kind!r} is not known; choose one of {', '.join(data.kinds)}, or give none")
    # Own prompts count once each: some are held out from the others.
    own = checked_templates(list(dict.fromkeys(prompts))) if prompts is not None else None
    general = own or data.templates[ANY][:_ANY_TEMPLATES]
    made = [(t, Prompt.of(t, form)) for form in forms for t in general]
    raw, spans = _read(reader, control.site, [p for _, p in made])
    if kind is None:
        kind = nearest_kind(control, normalised(torch.stack([x[s[-1]] for x, s in zip(raw, spans, strict=True)])))
    if prompts is None:
        more = [(t, Prompt.of(t, form)) for form in forms for t in data.templates[kind]]
        more_raw, more_spans = _read(reader, control.site, [p for _, p in more])
        made, raw, spans = made + more, raw + more_raw, spans + more_spans
    groups = _grouped(made, raw, spans, reader.leading_tokens) + _opening(reader, data, forms)
    return Subject(forms, kind, groups, _near(reader, control, data, forms, made, raw, spans, controls))


def nearest_kind(control: Control, states: Tensor) -> str:
    """The kind whose controls' last name tokens lie nearest, by linear discriminants on the mean state."""
    about = control.entity[control.text[control.last]]
    kinds = [control.entities[i].kind for i in about.tolist()]
    points = control.states[control.last].float()
    names = sorted(set(kinds))
    means = torch.stack([points[torch.tensor([k == name for k in kinds])].mean(0) for name in names])
    ridge = 0.1 * control.scatter.diagonal().mean() * torch.eye(points.shape[1])
    weights = torch.linalg.solve(control.scatter + ridge, (means - control.mean).T)
    values = (states.mean(0) - control.mean) @ weights - 0.5 * ((means - control.mean).T * weights).sum(0)
    return names[int(values.argmax())]


def _read(reader: Reader, site: int, prompts: Sequence[Prompt]) -> tuple[list[Tensor], list[list[int]]]:
    spans = reader.name_tokens(prompts)
    longest = max(len(s) for s in spans)
    if longest > LONGEST_NAME:
        raise MiningError(f"the name is {longest} tokens long, over the {LONGEST_NAME} KIF mines; give a shorter form")
    return reader.states([p.text for p in prompts], site), spans


def _grouped(
    made: Sequence[tuple[str, Prompt]], raw: Sequence[Tensor], spans: Sequence[list[int]], start: int
) -> tuple[Group, ...]:
    """One group for each form's last token, apart from names whose only token opens the sequence."""
    numbers = {t: i for i, t in enumerate(dict.fromkeys(t for t, _ in made))}
    found: dict[str, list[int]] = {}
    for i, ((_, prompt), span) in enumerate(zip(made, spans, strict=True)):
        if span[-1] > start:
            found.setdefault(prompt.name, []).append(i)
    return tuple(
        Group(
            "last",
            torch.stack([raw[i][spans[i][-1]] for i in chosen]),
            torch.tensor([numbers[made[i][0]] for i in chosen]),
        )
        for chosen in found.values()
    )


def _opening(reader: Reader, data: Corpus, forms: Sequence[str]) -> tuple[Group, ...]:
    """A group for each form that is one token at the start of a sequence: one state, since nothing comes before it."""
    start = reader.leading_tokens
    groups = []
    for form in forms:
        prompts = [Prompt.of(t, form) for t in ("{} is", *_ELSEWHERE, *data.templates[ANY])]
        spans = reader.name_tokens(prompts)
        if spans[0][-1] != start:
            continue
        rows = reader.states([p.text for p in prompts], OPENING_SITE)
        aside = [x[start + 1 :] if span[0] == start else x for x, span in zip(rows, spans, strict=True)]
        number = torch.zeros(1, dtype=torch.long)
        groups.append(Group("first", rows[0][start][None], number, normalised(join(aside, reader.width))))
    return tuple(groups)


def _near(
    reader: Reader, control: Control, data: Corpus, forms: Sequence[str], made: Sequence[tuple[str, Prompt]],
    raw: Sequence[Tensor], spans: Sequence[list[int]], controls: Sequence[str] | None,
) -> Tensor:  # fmt: skip
    """States that must not fire although they are close: near-miss names, given controls, words before the name."""
    step = max(1, len(data.entities) // _PARTNERS)
    others = [e.name for e in data.entities[step // 2 :: step]]
    # A part of one form may be another form, or end in one; a control given by the user may hold the name on purpose.
    names = [m for form in forms for m in near_misses(form, others) if not _holds(m, forms)]
    same = {form.casefold() for form in forms}
    names = list(dict.fromkeys([*names, *(c for c in controls or () if c.casefold() not in same)]))
    templates = data.templates[ANY]
    texts = [templates[i % len(templates)].replace("{}", n) for i, n in enumerate(names)]
    rows = [x for x in reader.states(texts, control.site)] if texts else []
    before = [x[: span[0]] for x, span in zip(raw, spans, strict=True)]
    return normalised(join([*rows, *before], reader.width))


def _holds(name: str, forms: Sequence[str]) -> bool:
    """Whether `name` holds a form of the subject as whole words."""
    return any(f" {form} ".casefold() in f" {name} ".casefold() for form in forms)
