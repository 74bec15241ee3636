"""`mine`: from a name to a capsule."""

import datetime
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..capsule import Capsule, Signature, opaque_id, slug
from ..errors import MiningError
from ..files import shown
from ..fingerprint import adapter_fingerprint
from ..ids import marks
from .control import RECIPE, Control, Progress
from .corpus import corpus
from .fisher import mine_fisher, names_in_common
from .paper import mine_paper
from .preparing import prepare
from .reading import Reader, undisturbed
from .refining import STEP_SIZE, STEPS
from .subject import Subject, checked_forms, find_subject, in_other_cases

METHODS = ("fisher", "kif-paper")
FEWEST_CONTROLS = 8
# Control text that names the subject is no negative; a name such as 'it' leaves too little to calibrate on.
FEWEST_NEGATIVES = 0.1
_LOW_RECALL = 0.9
_MUCH_KEPT = 0.5


def mine(
    model: nn.Module, tokenizer: Any, name: str, *, aliases: Sequence[str] = (), kind: str | None = None,
    prompts: Sequence[str] | None = None, controls: Sequence[str] | None = None, method: str = "fisher",
    false_positive_rate: float = 1e-5, private: bool = False, keep_name: bool = False, id: str | None = None,
    any_case: bool = False, site: int | None = None, steps: int = STEPS, date: str | None = None, adapted: bool = False,
    passages: Sequence[str] | None = None, progress: Progress | None = None,
) -> Capsule:  # fmt: skip
    """Mine the signature of `name` in `model` and return it as a capsule.

    aliases: other forms of the name. kind: `place`, `person`, …; found from the activations where not given. prompts:
    templates of your own with one `{}`, at least 8. controls: names that must not fire, at least 8. method: `fisher`
    (KIF's) or `kif-paper` (arXiv 2601.10566). false_positive_rate: asked per token and signature. private: a random id
    instead of a slug. keep_name: store the name and aliases in the capsule. any_case: each form in lower case and in
    capitals, too. site: block, by default a tenth of the way up. steps: refinement steps for the subject, 0 for mining
    in bulk. date: ISO day, by default today. adapted: find the signature as it is under the model's active PEFT
    adapter; the capsule is still one for the weights beneath, which is what a server checks. passages: text of your
    own, such as what the model is asked and answers; where it does not name the subject it must not fire, and a
    hundred thousand tokens are plenty.

    The first call for a model reads its controls (minutes; cached, see `prepare`); later ones take seconds. The model
    is left as it was. Raises MiningError for names, prompts or controls that cannot be mined from, ModelError for a
    model without decoder blocks.
    """
    _check_lists(aliases=aliases, prompts=prompts, controls=controls, passages=passages)
    given = checked_forms(name, aliases)
    id = checked_id(id, given[0], private)
    if method not in METHODS:
        raise MiningError(f"method {method!r} is not known; choose one of {', '.join(METHODS)}")
    if steps < 0:
        raise MiningError(f"{steps} refinement steps are not possible; ask for 0 or more")
    if not 0 < false_positive_rate <= 0.01:
        raise MiningError(f"a false-positive rate of {false_positive_rate:g} is outside (0, 0.01]; ask for one inside")
    if controls is not None and len(set(controls) - set(given)) < FEWEST_CONTROLS:
        raise MiningError(f"too few controls: give at least {FEWEST_CONTROLS} other names of the same kind, or none")
    with undisturbed(model, adapted):
        control = prepare(model, tokenizer, site=site, adapted=adapted, passages=passages or (), progress=progress)
        reader = Reader(model, tokenizer)
        forms = (*given, *in_other_cases(reader, given)) if any_case else given
        _check_negatives(control, forms)
        subject = find_subject(reader, control, forms, kind, prompts, controls)
        if method == "kif-paper":
            signatures: tuple[Signature, ...] = (mine_paper(reader, control, subject),)
            kept, near = None, None
        else:
            mined = mine_fisher(reader, control, subject, false_positive_rate, steps)
            signatures, kept, near = mined.signatures, mined.kept, mined.near_rate
    calibration = _summary(control, subject, signatures, kept, near)
    provenance = {"kif": __version__, "date": date or datetime.date.today().isoformat()} | asked(
        None if private else marks(id, given), adapter_fingerprint(model) if adapted else None, site=control.site,
        method=method, prompts=prompts, steps=steps, passages=passages, any_case=any_case,
    )  # fmt: skip
    capsule = Capsule(
        id=id, signatures=signatures, model=control.fingerprint, width=reader.width, blocks=len(reader.blocks),
        calibration=calibration, provenance=provenance,
        name=given[0] if keep_name and not private else None, aliases=given[1:] if keep_name and not private else (),
    )  # fmt: skip
    capsule.validate()
    return capsule


def asked(
    forms: list[str] | None, adapter: str | None, *, site: int, method: str = "fisher",
    prompts: Sequence[str] | None = None, steps: int = STEPS, passages: Sequence[str] | None = None,
    any_case: bool = False, **_unrecorded: Any,
) -> dict[str, Any]:  # fmt: skip
    """What a capsule's provenance says about how it was mined, from keywords of `mine`. forms: their marks."""
    settings: dict[str, Any] = {"site": site, "steps": steps, "step_size": STEP_SIZE, "recipe": RECIPE}
    settings |= {"adapter": adapter} if adapter is not None else {}
    settings |= {"own_text": True} if passages else {}
    settings |= {"any_case": True} if any_case else {}
    settings |= {"forms": forms} if forms is not None else {}
    told = "own" if prompts is not None else corpus().digest
    return {"method": method, "prompts": told, "settings": settings}


def checked_id(id: str | None, name: str, private: bool) -> str:
    """The id given, or the one the name gets. Raises MiningError for one that no capsule can have."""
    if id is None:
        return opaque_id() if private else slug(name)
    if not isinstance(id, str) or not id or slug(id) != id:
        raise MiningError(f"the id {shown(str(id), 60)!r} is not valid; use lower-case letters, digits and single '-'")
    return id


def _check_lists(**lists: Sequence[str] | None) -> None:
    for what, given in lists.items():
        if given is not None and (isinstance(given, str) or not all(isinstance(x, str) for x in given)):
            raise MiningError(f"{what} must be a list of texts; write it as one")


def _check_negatives(control: Control, forms: Sequence[str]) -> None:
    texts = [control.text, control.opening.text, *([control.early.text] if control.early else [])]
    shares = [control.silent(text, forms).float().mean() for text in texts]
    if min(shares) < FEWEST_NEGATIVES:
        raise MiningError("the name, or an alias, is part of nearly every text; give a longer form of it")


def _summary(
    control: Control, subject: Subject, signatures: Sequence[Signature], kept: float | None, near: float | None
) -> dict[str, Any]:
    """The capsule's own calibration: the worst of its signatures, and what the person who asked should know."""
    summary: dict[str, Any] = {"kind": subject.kind, "warnings": []}
    recalls = [s.calibration["recall"] for s in signatures if "recall" in s.calibration]
    if recalls:
        summary["recall"] = min(recalls)
        summary["false_positive_rate"] = sum(s.calibration.get("measured", 0.0) for s in signatures)
        if summary["recall"] < _LOW_RECALL:
            summary["warnings"].append(f"the name is recognised in only {summary['recall']:.0%} of held-out prompts")
    if near is not None:
        summary["near_miss_rate"] = near
        if near > 0.02:
            summary["warnings"].append(f"{near:.0%} of the tokens of names that share its words are suppressed too")
    if kept is not None:
        summary["kept"] = kept
        if kept > _MUCH_KEPT:
            summary["warnings"].append(f"{kept:.0%} of the divergence from the prior is left on held-out prompts")
    fired, count = _homonyms(control, subject, signatures)
    if count and fired > 0:
        summary["warnings"].append(
            f"{count} other known names share the whole name, and {fired:.0%} of their mentions are suppressed too"
        )
        summary["homonym_rate"] = fired
    return summary


def _homonyms(control: Control, subject: Subject, signatures: Sequence[Signature]) -> tuple[float, int]:
    """(share of mentions that fire, number) of known other names that hold the subject's name or are held by it."""
    numbers = names_in_common(subject.forms, [e.name for e in control.entities])
    if not numbers:
        return 0.0, 0
    wanted = torch.isin(control.entity[control.text], torch.tensor(numbers))
    states = control.states[wanted & control.last].float()
    fires = torch.zeros(len(states), dtype=torch.bool)
    for s in signatures:
        if s.site != control.site:
            continue
        scores = states @ s.detector + s.bias
        fires |= scores > (s.tau or 0.0)
    return float(fires.float().mean()) if len(states) else 0.0, len(numbers)
