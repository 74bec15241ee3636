"""kif mine: from a subject's name to its capsule."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kif_runtime.errors import KifError
from kif_runtime.files import shown

from .. import options, outputs
from ..console import err, out, print_json, progress, warn

if TYPE_CHECKING:
    from kif_runtime import Capsule

SUFFIX = ".kif.safetensors"
Method = Literal["fisher", "kif-paper"]


def mine(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The capsule file, or a folder that it goes into.")
    ],
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The subject.")] = None,
    batch: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Mine every line of a JSON lines file instead; run again to go on."),
    ] = None,
    alias: Annotated[list[str] | None, typer.Option(metavar="A", help="Another name of the subject.")] = None,
    any_case: Annotated[
        bool, typer.Option("--any-case", help="Each name in lower case and in capitals, too: a larger capsule.")
    ] = False,
    kind: Annotated[
        str | None, typer.Option(metavar="K", help="What it is; found from the model if not given.")
    ] = None,
    controls: Annotated[Path | None, typer.Option(metavar="FILE", help="Names to tell it from, one a line.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Own templates, one a line, with one {}.")
    ] = None,
    method: Annotated[Method, typer.Option(help="How signatures are found.")] = "fisher",
    private: Annotated[
        bool, typer.Option("--private", help="A random id, so that not even the file's name tells.")
    ] = False,
    with_name: Annotated[bool, typer.Option("--with-name", help="Store the name and aliases in the capsule.")] = False,
    false_positive_rate: Annotated[
        float, typer.Option(metavar="F", help="Share of ordinary tokens that a signature may fire on.")
    ] = 1e-5,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Find it as it is with this PEFT adapter on the model, where one is served."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text of your own where it must not fire, such as what the model is asked."),
    ] = None,
    site: Annotated[
        int | None,
        typer.Option(metavar="L", help="The block to work at (`kif sites`); a tenth of the way up."),
    ] = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Find a subject's signature; write it as a capsule.

    The capsule file has mode 0600: a detector can be decoded into the name it looks for. One found under an adapter is
    for the same model, and can be served beside others of it.
    """
    if (name is None) == (batch is None):
        raise KifError("give a subject's name, or a file of them with --batch; see `kif mine --help`")
    if not 0 < false_positive_rate < 1:
        raise KifError(f"--false-positive-rate is {false_positive_rate:g}; it is a share of tokens, over 0 and under 1")
    if private and with_name:
        raise KifError("a --private capsule holds no name; leave out --private or --with-name")
    wanted: dict[str, Any] = {"method": method, "false_positive_rate": false_positive_rate}
    wanted |= {"kind": kind, "private": private, "keep_name": with_name, "adapted": adapter is not None}
    wanted |= {"site": site, "any_case": any_case}
    wanted |= {"prompts": outputs.read_lines(prompts, "prompts")} if prompts else {}
    wanted |= {"controls": outputs.read_lines(controls, "controls")} if controls else {}
    wanted |= {"passages": outputs.read_lines(text, "text")} if text else {}
    if batch is not None:
        if alias:
            raise KifError("--alias is for one subject; in a batch, put aliases into its lines")
        _mine_batch(model, batch, output, wanted, adapter, device, json)
        return
    assert name is not None
    if not name.strip():
        raise KifError("the name is empty; give the subject's name")
    wanted |= {"aliases": tuple(alias or ())}
    target = _target(output, name, private)
    capsule, seconds = _mine_one(model, name, wanted, adapter, device)
    target = target or output / f"{capsule.id}{SUFFIX}"
    if output.name != target.name:
        outputs.make_folder(output)
    capsule.save(target)
    _print(capsule, target, seconds, json)


def _target(output: Path, name: str, private: bool) -> Path | None:
    """The file to write, None where only the mined id will tell; checked as far as can be before the work."""
    from kif_runtime import Capsule
    from kif_runtime.ids import mark, slug

    id = None if private else slug(name)
    target: Path | None = output
    if _is_folder(output):
        outputs.check_folder(output)
        target = None if id is None else output / f"{id}{SUFFIX}"
    else:
        outputs.check_file(output)
    if target is not None and os.path.lexists(target):
        there = Capsule.load(target)  # refuses what is no capsule
        there.check_subject(id, id and mark(id, name), target)
    return target


def _is_folder(path: Path) -> bool:
    """A folder, or what can only be meant as one: capsule files have a suffix."""
    return path.is_dir() or not path.suffix


def _mine_one(
    model: str, name: str, wanted: dict[str, Any], adapter: Path | None, device: str | None
) -> "tuple[Capsule, float]":
    from ..loading import open_model

    try:
        loaded, tokenizer = open_model(model, adapter=adapter, device=device)
        from kif_runtime.mining import mine as find
        from kif_runtime.mining import prepare

        with progress() as report:
            # once per model and adapter, and not part of the seconds
            once = {key: wanted[key] for key in ("site", "adapted", "passages") if key in wanted}
            prepare(loaded, tokenizer, progress=report, **once)
            begun = time.perf_counter()
            capsule = find(loaded, tokenizer, name, progress=report, **wanted)
        return capsule, time.perf_counter() - begun
    except KeyboardInterrupt:
        raise KifError("interrupted; nothing written") from None


def _mine_batch(
    model: str, requests: Path, folder: Path, wanted: dict[str, Any], adapter: Path | None, device: str | None,
    json: bool,
) -> None:  # fmt: skip
    outputs.read_lines(requests, "requests")
    if folder.is_file():
        raise KifError(f"{shown(folder)} is a file; give a folder for the capsules of a batch")
    outputs.check_folder(folder)
    from ..loading import open_model

    try:
        loaded, tokenizer = open_model(model, adapter=adapter, device=device)
        from kif_runtime.mining import mine_batch

        outputs.make_folder(folder)
        with progress() as report:
            result = mine_batch(loaded, tokenizer, requests, folder, progress=report, **wanted)
    except KeyboardInterrupt:
        raise KifError("interrupted; the capsules that are done stay, run the same command to go on") from None
    failed = [{"line": line, "error": message} for line, message in result.failed]
    if json:
        counts = {"done": list(result.done), "skipped": list(result.skipped), "failed": failed}
        print_json({"folder": str(folder), **counts})
    else:
        out().print(f"{len(result.done)} mined, {len(result.skipped)} there already, {len(failed)} failed; in {folder}")
    for line in failed:
        err().print(f"kif: {shown(requests)}, line {line['line']}: {line['error']}")
    if failed:
        raise typer.Exit(2)


def _print(capsule: "Capsule", file: Path, seconds: float, json: bool) -> None:
    from ..describing import describe, quality, summary

    if json:
        print_json({"file": str(file), "seconds": round(seconds, 3), "capsule": describe(capsule)})
    else:
        out().print(f"{capsule.id} mined in {seconds:.1f} s: {summary(capsule)}")
        for what, value in quality(capsule.calibration):
            out().print(f"  {what}: {value}")
        out().print(f"written to {file}")
    for text in capsule.calibration.get("warnings") or ():
        warn(str(text))
