"""Whether a capsule's thresholds hold for a model as it is now: under an adapter, in another number format.

Signatures were found in one model's states and are looked for in another's. So they are put to the states of sentences
that name the subject, and of text that does not, as the operator would see them there.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..capsule import Capsule
from ..mining.corpus import ANY, corpus, mentions
from ..mining.reading import Prompt, Reader
from .firing import Firing, watching

# Of names that were recognised before, so many still have to be; and of other tokens at most so many may fire, which is
# twice what mining accepts at most.
LEAST_RECALL, MOST_FALSE_FIRES = 0.95, 1e-4
_BATCH = 16


class Rates(NamedTuple):
    """recall: share of the names in `prompts` sentences on which the capsule fires, None where no name is known.

    false_fires: share of the `tokens` tokens, of text that does not name the subject, on which it fires.
    """

    recall: float | None
    prompts: int
    false_fires: float
    tokens: int

    def hold_against(self, before: "Rates") -> bool:
        """Whether these, measured under an adapter, are near enough to those measured without it."""
        kept = self.recall is None or before.recall is None or self.recall >= LEAST_RECALL * before.recall
        return kept and self.false_fires <= max(MOST_FALSE_FIRES, 2 * before.false_fires)


def rates(model: Any, tokenizer: Any, capsule: Capsule, names: Sequence[str] = ()) -> Rates:
    """How often `capsule` fires in `model`, with its active adapter if it has one, on `names` and on other text.

    names: forms of the subject, by default those stored in the capsule. A name counts as recognised where any signature
    fires on any of its tokens. Raises MiningError for a tokenizer that cannot tell where tokens lie.
    """
    names = tuple(names) or tuple(name for name in (capsule.name, *capsule.aliases) if name)
    reader = Reader(model, tokenizer, batch_tokens=1 << 30)
    templates = [t for t in corpus().templates[ANY] if t.count("{}") == 1]
    prompts = [Prompt.of(t, name) for name in names for t in templates]
    others = [text for text in corpus().passages if not (names and mentions(text, names))]
    with watching(model, [capsule], apply=True) as firing:
        spans = reader.name_tokens(prompts) if prompts else []
        hits = list(hits_on(reader, firing, [p.text for p in prompts]))
        found = [bool(hit[span].any()) for hit, span in zip(hits, spans, strict=True)]
        tokens = torch.cat(list(hits_on(reader, firing, others)))
    recall = sum(found) / len(found) if found else None
    return Rates(recall, len(found), float(tokens.float().mean()), len(tokens))


def hits_on(reader: Reader, firing: Firing, texts: Sequence[str]) -> Iterator[Tensor]:
    """For each text, in order, on which of its tokens the capsule fires, [T] bool. Blocks after its sites rest.

    reader: with `batch_tokens` for _BATCH texts, since `firing` knows only the last batch.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]  # already in the order of length, so the reader keeps it, in one batch
        states = reader.states([texts[i] for i in chosen], firing.bank.sites[-1])
        hits = firing.hits.view(len(chosen), -1, len(firing.ids)).any(-1)
        found |= {i: hit[: len(x)] for i, hit, x in zip(chosen, hits, states, strict=True)}
    yield from (found[i] for i in range(len(texts)))
