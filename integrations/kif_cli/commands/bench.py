"""kif bench: what suppression costs, as ratios; on a GPU; in a server; or as compiled for GPUs that are not here."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kif_runtime.errors import KifError

from .. import options
from ..benchmarks.serving.cells import Grid
from ..console import out, print_json, progress, working
from ..outputs import check_folder, make_folder, write_json, write_text

Measured = tuple[dict[str, Any], dict[str, str]]  # results, plots
SIZES, ROUNDS = "1,10,100,1000,10000", 7
SERVED_SIZES, SERVED_ROUNDS = "0,1,100,1000", 3
Applied = Literal["mandatory", "resident", "both"]


def bench(
    context: typer.Context,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="PEER", help="Measure this beside KIF (several times): dense, add, copy; "
                     "with --gpu also vllm, liger, compile."),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile the kernels for every target instead.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Measure the kernels on this machine's GPU instead.")] = False,
    serve: Annotated[
        str | None, typer.Option("--serve", metavar="M", help="Measure vLLM servers of this model instead.")
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", metavar="M", help="The model to measure beside.")] = "embedded",
    capsules: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also with all capsules of this folder at once, at their sites; with --serve "
                     "its capsules are served, and random ones without it."),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(metavar="N,N", help=f"Signatures at one site, {SIZES}; with --serve capsules, {SERVED_SIZES}."),
    ] = None,
    applied: Annotated[
        Applied, typer.Option(help="--serve: whether capsules apply to every request, or to those that name them.")
    ] = "mandatory",
    touched: Annotated[
        str, typer.Option(metavar="P,P", help="--serve: percent of requests on which a capsule fires.")
    ] = "0,1,100",
    concurrency: Annotated[str, typer.Option(metavar="N,N", help="--serve: requests at a time.")] = "8",
    lengths: Annotated[
        str, typer.Option(metavar="P:O,P:O", help="--serve: tokens of a prompt and of its answer.")
    ] = "64:16",
    requests: Annotated[int, typer.Option(min=1, help="--serve: requests of each kind and round.")] = 32,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="--serve: measure also requests for this LoRA adapter.")
    ] = None,
    widths: Annotated[
        str, typer.Option(metavar="D,D", help="Widths of hidden states for --compiled and --gpu.")
    ] = "576,2048,4096,5120,8192",
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help=f"Rounds, {ROUNDS} or, with --serve, {SERVED_ROUNDS}; the median is shown."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Write results.json and plots (SVG) to it, with --serve also "
                     "requests.csv. The same command again goes on where it was cut off."),
    ] = None,
    json: options.Json = False,
) -> None:  # fmt: skip
    """Measure what suppression costs.

    Alone: on the CPU, as a share of the model's own forward. With --compiled: registers, spills, accesses, bytes and
    compile time of every kernel for sm_80, sm_90, sm_100 and gfx942; exit code 1 where the gate fails; needs no GPU.
    With --gpu: times on the GPU of this machine; without one, exit code 2 and no figure. With --serve: a vLLM server
    with KIF beside a stock one, both under the same requests, on whatever device vLLM finds; what comes after `--` goes
    to both servers.
    """
    if sum((compiled, gpu, serve is not None)) > 1:
        raise KifError("--compiled, --gpu and --serve are measurements of their own; ask for one at a time")
    if context.args and serve is None:
        raise KifError(f"{context.args[0]!r} is for servers, and there is no --serve; leave it out")
    if output is not None:
        check_folder(output)
    peers = tuple(against or ())
    if serve is not None:
        if peers:
            raise KifError("--against is for operators; --serve compares with stock vLLM")
        grid = Grid(
            sizes=numbers(sizes or SERVED_SIZES, "--sizes", least=0),
            applied=("mandatory", "resident") if applied == "both" else (applied,),
            touched=_percents(touched), concurrency=numbers(concurrency, "--concurrency"), lengths=_lengths(lengths),
            adapter=(False,) if adapter is None else (False, True), requests=requests, rounds=rounds or SERVED_ROUNDS,
        )  # fmt: skip
        results, plots = _on_servers(serve, grid, capsules, adapter, context.args, output)
    elif compiled:
        results, plots = _compiled(output, numbers(widths, "--widths"), peers)
    elif gpu:
        results, plots = _on_gpu(output, numbers(widths, "--widths"), peers, rounds or ROUNDS)
    else:
        results, plots = _on_cpu(output, model, capsules, numbers(sizes or SIZES, "--sizes"), peers, rounds or ROUNDS)
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


def numbers(text: str, option: str, least: int = 1) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < least:
        raise KifError(f"{option} {text!r} are not whole numbers from {least} up, as in {option} 1,100")
    return found


def _percents(text: str) -> list[int]:
    found = numbers(text, "--touched", least=0)
    if found[-1] > 100:
        raise KifError(f"--touched {text!r} are not percents, as in --touched 0,1,100")
    return found


def _lengths(text: str) -> list[tuple[int, int]]:
    try:
        found = [(int(prompt), int(output)) for prompt, _, output in (part.partition(":") for part in text.split(","))]
    except ValueError:
        found = [(0, 0)]
    if any(prompt < 1 or output < 2 for prompt, output in found):
        raise KifError(f"--lengths {text!r} are not tokens of prompt and answer, at least 1:2, as in --lengths 64:16")
    return found


def _on_servers(
    model: str, grid: Grid, capsules: Path | None, adapter: Path | None, flags: list[str], output: Path | None
) -> Measured:
    from ..benchmarks.serving.plots import plots
    from ..benchmarks.serving.rounds import measured

    if output is not None:
        make_folder(output)
    with progress() as report:
        results = measured(model, grid, capsules, adapter, flags, output, report)
    if output is not None:
        write_json(output / "results.json", results)
    return results, plots(results["serving"])


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
    """Columns that hold one number or word each, and ratios with their spread; what else is nested is in the JSON."""
    if not rows:
        return
    columns = [n for n, value in rows[0].items() if not isinstance(value, dict) or "ratio" in value]
    cells = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    sizes = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    out().print(f"\n{title}")
    for line in cells:
        out().print("  ".join(cell.ljust(size) for cell, size in zip(line, sizes, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return f"{value['ratio']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
