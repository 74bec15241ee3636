"""Where capsules go in a model, and whether they belong there: what `attach` settles before it touches the model."""

from collections.abc import Iterable, Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn

from kif_runtime.bank import CapsuleBank
from kif_runtime.blocks import unwrapped, width
from kif_runtime.capsule import Capsule
from kif_runtime.errors import CapsuleError, ModelError, RequestError

_VALID: WeakSet[Capsule] = WeakSet()  # a capsule is frozen, so once is enough
MAX_SETS = 256  # different capsule sets at once, in one batch and the `using` blocks around it


def owner_of(model: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    """The module whose forward runs the decoder blocks."""
    owners = [m for m in unwrapped(model).modules() if any(child is blocks for child in m.children())]
    if len(owners) != 1:
        raise ModelError(f"cannot tell which module of {type(model).__name__} runs its blocks; KIF cannot attach to it")
    return owners[0]


def named(
    capsules: Iterable[Capsule], mandatory: Iterable[Capsule | str]
) -> tuple[dict[str, Capsule], dict[str, Capsule]]:
    """Both by id. Raises RequestError for what is no capsule, an id that is not there, or two capsules under one id."""
    known: dict[str, Capsule] = {}
    default = dict(_named(c, known) for c in _several(capsules))
    return default, dict(_named(c, known) for c in _several(mandatory))


def _several(capsules: Iterable[Capsule | str]) -> Iterable[Capsule | str]:
    if isinstance(capsules, Capsule | str):
        raise RequestError("attach() takes a list of capsules; put the one into a list")
    return capsules


def _named(capsule: Capsule | str, known: dict[str, Capsule]) -> tuple[str, Capsule]:
    if isinstance(capsule, str):
        if capsule not in known:
            raise RequestError(f"mandatory names {capsule!r}, which is not among the capsules; pass the capsule itself")
        return capsule, known[capsule]
    if not isinstance(capsule, Capsule):
        raise RequestError(
            f"attach() takes capsules, got {type(capsule).__name__}; use Capsule.load(file) or mine(...)"
        )
    if known.setdefault(capsule.id, capsule).digest != capsule.digest:
        raise RequestError(f"two different capsules have the id {capsule.id!r}; give one of them another id")
    return capsule.id, capsule


def check_model(model: nn.Module, capsules: Sequence[Capsule]) -> None:
    """Raise CapsuleError unless every capsule was made for `model`."""
    belongs = None
    for capsule in capsules:
        try:
            if capsule not in _VALID:
                capsule.validate()
                _VALID.add(capsule)
            made_for = (capsule.model, capsule.width, capsule.blocks)
            if made_for != belongs:  # the fingerprint is taken once, not for each of a thousand capsules
                capsule.check_model(model)
                belongs = made_for
        except CapsuleError as error:
            raise CapsuleError(f"capsule {capsule.id!r}: {error}") from None


def new_bank(
    model: nn.Module, capsules: dict[str, Capsule], device: torch.device, max_false_fire: float | None
) -> CapsuleBank:
    """A bank that holds just `capsules`, on `device`."""
    return CapsuleBank.for_capsules(
        capsules.values(), width=width(model), max_sets=MAX_SETS, device=device, max_false_fire=max_false_fire
    )


def check_bank(
    bank: CapsuleBank, capsules: dict[str, Capsule], device: torch.device, max_false_fire: float | None
) -> None:
    """Raise RequestError unless `bank` is on `device` and holds `capsules`."""
    if max_false_fire is not None:
        raise RequestError("max_false_fire belongs to the bank; give it to CapsuleBank when you also pass bank")
    for id, capsule in capsules.items():
        if id not in bank.capsules or bank.capsules[id].digest != capsule.digest:
            raise RequestError(f"the bank does not hold the capsule {id!r} that is attached; add it to the bank first")
    there = bank.site(bank.sites[0]).detector.device if bank.sites else device
    if there != device:
        raise RequestError(
            f"the bank is on {there} and the model on {device}; make the bank with device={str(device)!r}"
        )


def device_of(blocks: nn.ModuleList, sites: Sequence[int]) -> torch.device:
    """The device of the blocks at `sites` (of the first block, where there are none). Raises ModelError for several."""
    devices = {p.device for site in sites or [0] for p in blocks[site].parameters()}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ModelError(
            f"the decoder blocks where capsules apply lie on several devices ({found}); load the model on one"
        )
    device = devices.pop()
    if device.type == "meta":
        raise ModelError(
            "the decoder blocks where capsules apply are offloaded; load the model into memory to attach capsules"
        )
    return device


def stop_tokens(model: nn.Module, device: torch.device) -> Tensor:
    """[E] the end and padding ids of the model's generation, which are what generate feeds to rows that have ended."""
    ids: set[int] = set()
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        for name in ("eos_token_id", "pad_token_id"):
            value = getattr(source, name, None)
            ids.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    with torch.inference_mode(False):
        return torch.tensor(sorted(ids), dtype=torch.long, device=device)
