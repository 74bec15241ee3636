"""kif bench: what suppression costs, as ratios; on a GPU; or as compiled for GPUs that are not here."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kif_runtime.errors import KifError

from .. import options
from ..console import out, print_json, progress, working
from ..outputs import check_folder, write_text

Measured = tuple[dict[str, Any], dict[str, str]]  # results, plots
SIZES = (1, 10, 100, 1000, 10000)


def bench(
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="PEER", help="Measure this beside KIF (several times): dense, add, copy; "
                     "with --gpu also vllm, liger, compile."),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile the kernels for every target instead.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Measure the kernels on this machine's GPU instead.")] = False,
    model: Annotated[str, typer.Option("--model", "-m", metavar="M", help="The model to measure beside.")] = "embedded",
    capsules: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also with all capsules of this folder at once, at their sites.")
    ] = None,
    sizes: Annotated[str, typer.Option(metavar="N,N", help="Signatures at one site.")] = ",".join(map(str, SIZES)),
    widths: Annotated[
        str, typer.Option(metavar="D,D", help="Widths of hidden states for --compiled and --gpu.")
    ] = "576,2048,4096,5120,8192",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median is shown.")] = 7,
    output: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Write results.json and plots (SVG) to it. A run "
                                  "that was cut off goes on there.")
    ] = None,
    json: options.Json = False,
) -> None:  # fmt: skip
    """Measure what suppression costs.

    Alone: on the CPU, as a share of the model's own forward. With --compiled: registers, spills, accesses, bytes and
    compile time of every kernel for sm_80, sm_90, sm_100 and gfx942; exit code 1 where the gate fails; needs no GPU.
    With --gpu: times on the GPU of this machine; without one, exit code 2 and no figure.
    """
    if compiled and gpu:
        raise KifError("--compiled and --gpu are two measurements; ask for one at a time")
    if output is not None:
        check_folder(output)
    peers = tuple(against or ())
    if compiled:
        results, plots = _compiled(output, numbers(widths, "--widths"), peers)
    elif gpu:
        results, plots = _on_gpu(output, numbers(widths, "--widths"), peers, rounds)
    else:
        results, plots = _on_cpu(output, model, capsules, numbers(sizes, "--sizes"), peers, rounds)
    if output is not None:
        for name, plot in plots.items():
            write_text(output / f"{name}.svg", plot)
    if json:
        print_json(results)
    else:
        for title, rows in results.items():
            if isinstance(rows, list):
                _table(title, rows)
    if results.get("failures"):
        raise typer.Exit(1)


def numbers(text: str, option: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise KifError(f"{option} {text!r} are not whole numbers over 0, as in {option} 1,100")
    return found


def _on_cpu(
    output: Path | None, model: str, capsules: Path | None, sizes: list[int], peers: tuple[str, ...], rounds: int
) -> Measured:
    from kif_runtime import Capsule

    from ..benchmarks import growth
    from ..benchmarks.record import Record
    from ..loading import open_model

    _known(peers, growth.PEERS)
    paths = sorted(capsules.glob("*.kif.safetensors")) if capsules else []
    if capsules and not paths:
        raise KifError(f"{capsules} holds no capsules (*.kif.safetensors)")
    loaded, tokenizer = open_model(model)
    record = Record(output, {"model": model, "rounds": rounds})
    with working("measuring; other programs on this machine disturb it"):
        growth.growth(record, loaded, tokenizer, sizes, peers or ("dense",), rounds)
        if paths:
            growth.mined(record, loaded, tokenizer, [Capsule.load(p) for p in paths], rounds)
    return record.results, growth.plots(record.results)


def _compiled(output: Path | None, widths: list[int], peers: tuple[str, ...]) -> Measured:
    if peers:
        raise KifError("--against compares times; --compiled takes none")
    try:
        from ..benchmarks import compiled
    except ImportError:
        raise KifError("--compiled needs triton; install it with: pip install triton") from None
    with progress() as report:
        return compiled.measured(output, widths, report)


def _on_gpu(output: Path | None, widths: list[int], peers: tuple[str, ...], rounds: int) -> Measured:
    from ..benchmarks import gpu

    return gpu.measured(output, widths, peers, rounds)


def _known(peers: tuple[str, ...], known: Any) -> None:
    for peer in peers:
        if peer not in known:
            raise KifError(f"--against {peer!r} is not among {', '.join(known)}")


def _table(title: str, rows: list[dict[str, Any]]) -> None:
    """Columns that hold one number or word each; what is nested is in the JSON."""
    if not rows:
        return
    columns = [name for name, value in rows[0].items() if not isinstance(value, dict)]
    cells = [columns, *([_cell(row[name]) for name in columns] for row in rows)]
    sizes = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    out().print(f"\n{title}")
    for line in cells:
        out().print("  ".join(cell.ljust(size) for cell, size in zip(line, sizes, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
