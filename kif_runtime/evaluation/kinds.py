"""What kind of thing a fact's subject is, read off how it is asked about; and which subjects are alike."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..blocks import text_config, unwrapped, width
from .facts import BATCH, Fact, keeping, padded

KINDS = ("place", "person", "organisation", "work", "product", "event", "concept", "other")

# Tried in order on the name itself, then on relation and question. Wikidata's property numbers are relations too.
_BY_NAME = (
    ("event", r"\b(bombings?|war|battle|massacre|earthquake|olympics|elections?|revolution|siege|treaty)\b"),
    ("organisation", r"\b(bank|party|company|association|federation|broadcasting|university|airlines?|ferries)\b"),
    ("place", r"\b(glacier|ridge|ice shelf|island|islands|lake|river|district|county|prefecture|mountains?)\b"),
    ("concept", r"\b(religion|theory|model|grape|franc)\b"),
)
_BY_RELATION = (
    ("person", r"^(person|superhero|president)|^P(19|20|27|39|69|101|103|106|140|413|463|641|1303|1412)$"),
    ("organisation", r"^company|^P(127|159|740)$"),
    ("place", r"^(landmark|country|city|star)|^P(17|30|36|37|131|190|1376)$"),
    ("product", r"^(product|food)|^P(176|178|1056)$"),
    ("work", r"^P(364|407|449|495)$"),
    ("event", r"^P276$"),
)
_BY_QUESTION = (
    ("person", r"native (language|speaker)|mother tongue|citizenship|expertise|works in the|occupation|plays|speaks"),
    ("person", r"\b(died|born|originates)\b|(follows|affiliated with) the religion|follower of"),
    ("organisation", r"headquarter|is based in|was founded|\bformed in\b"),
    ("product", r"(developed|produced|manufactured|made) by|(is|was) created by|a product"),
    ("work", r"written in|original language|created in the country|premiered|directed by|genre"),
    ("place", r"located|continent|capital|official (language|religion|currency)|language spoken|in the country of"),
)


def kind_of(relation: str, prompt: str, subject: str = "") -> str:
    """One of KINDS, from tell-tale words in the name, then the relation, then the question; "other" where none says.

    For tables only: a heuristic, and a wrong kind does no harm but to put a fact in another row.
    """
    question = prompt.replace(subject, "", 1) if subject else prompt
    for table, text in ((_BY_NAME, subject), (_BY_RELATION, relation), (_BY_QUESTION, f"{relation} {question}")):
        for kind, pattern in table:
            if re.search(pattern, text, re.IGNORECASE):
                return kind
    return "other"


def kinds_of(facts: Sequence[Fact]) -> dict[str, str]:
    """The kind of each subject, by its first fact."""
    kinds: dict[str, str] = {}
    for fact in facts:
        kinds.setdefault(fact.subject, kind_of(fact.relation, fact.prompt, fact.subject))
    return kinds


@torch.inference_mode()
def name_states(model: Any, tokenizer: Any, names: Sequence[str]) -> torch.Tensor:
    """[N, D] fp32: what the model makes of each name, from "The " + name: its last token at a third of the depth.

    Centred over the names and of unit length, so that dot products compare them.
    """
    depth = max(1, text_config(unwrapped(model)).num_hidden_layers // 3)
    device = next(model.parameters()).device
    prompts = [tokenizer("The " + name, add_special_tokens=False)["input_ids"] for name in names]
    found = torch.zeros(len(names), width(model))
    order = sorted(range(len(names)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        ids, mask = padded([prompts[i] for i in some])
        options = {"use_cache": False, "output_hidden_states": True} | keeping(model, 1)
        hidden = model(input_ids=ids.to(device), attention_mask=mask.to(device), **options).hidden_states[depth]
        found[some] = hidden[torch.arange(len(some)), mask.sum(1) - 1].float().cpu()
    return torch.nn.functional.normalize(found - found.mean(0), dim=1)


def nearest(
    name: str, names: Sequence[str], states: torch.Tensor, kinds: Mapping[str, str], count: int = 5
) -> list[str]:
    """The `count` others among `names` of the same kind as `name` whose states [N, D] are most like its own."""
    alike = states @ states[list(names).index(name)]
    order = [names[i] for i in alike.argsort(descending=True).tolist()]
    return [other for other in order if other != name and kinds[other] == kinds[name]][:count]
