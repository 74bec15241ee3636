"""What kind of thing a name stands for, told from what the model makes of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .corpus import ANY, Corpus, corpus
from .reading import Prompt, Reader, normalised

_TEMPLATES = 8
_RIDGE = 0.5
_LIKELY = 0.1


@dataclass(frozen=True)
class Kinds:
    """Linear discriminants of the kinds in `names`: weights [K, D] and bias [K], on RMS-normalised states of a name's
    last token at block `site`, half way up, where what the model knows of the name has gathered."""

    site: int
    names: tuple[str, ...]
    weights: Tensor
    bias: Tensor

    def likely(self, reader: Reader, name: str) -> tuple[str, ...]:
        """The kinds that `name` may be of, likeliest first: that one, and others with a share over _LIKELY."""
        state = _states(reader, [Prompt.of(t, name) for t in _templates(corpus())], self.site).mean(0)
        shares = (self.weights @ state + self.bias).softmax(0)
        order = shares.argsort(descending=True).tolist()
        return tuple(self.names[i] for i in order if i == order[0] or shares[i] > _LIKELY)


def learn_kinds(reader: Reader, data: Corpus, tick: Callable[[int], None] | None = None) -> Kinds:
    """Fisher's discriminants (1936), with a ridge, from every second entity in one template each."""
    entities = data.entities[::2]
    templates = _templates(data)
    site = len(reader.blocks) // 2
    prompts = [Prompt.of(templates[i % len(templates)], e.name) for i, e in enumerate(entities)]
    return discriminants(_states(reader, prompts, site, tick), [e.kind for e in entities], data.kinds, site)


def _templates(data: Corpus) -> list[str]:
    """Templates for anything in which the name does not open the sequence, where it could not be seen."""
    return [t for t in data.templates[ANY] if not t.startswith("{}")][:_TEMPLATES]


def discriminants(states: Tensor, kinds: list[str], names: tuple[str, ...], site: int) -> Kinds:
    """From states [N, D] and the kind of each; all kinds count as equally frequent."""
    number = torch.tensor([names.index(kind) for kind in kinds])
    means = torch.stack([states[number == k].mean(0) for k in range(len(names))])
    away = states - means[number]
    spread = away.T @ away / len(states)
    spread += _RIDGE * spread.diagonal().mean() * torch.eye(len(spread))
    weights = torch.linalg.solve(spread, means.T).T.contiguous()
    return Kinds(site, names, weights, -0.5 * (means * weights).sum(1))


def _states(reader: Reader, prompts: list[Prompt], site: int, tick: Callable[[int], None] | None = None) -> Tensor:
    """[N, D]: RMS-normalised states of each name's last token."""
    rows = reader.states([p.text for p in prompts], site, tick)
    return normalised(torch.stack([x[s[-1]] for x, s in zip(rows, reader.name_tokens(prompts), strict=True)]))
