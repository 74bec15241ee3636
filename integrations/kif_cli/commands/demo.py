"""kif demo: the main job, end to end, on the embedded model, with a page that shows it."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kif_runtime.errors import KifError

from .. import options, outputs
from ..console import err, print_json, progress
from ..console import out as stdout

if TYPE_CHECKING:
    from kif_runtime import Capsule

    from ..demonstration import Script

MODEL, MODEL_NAME = "embedded", "SmolLM2-135M-Instruct"
STEPS = 6


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the capsule and the page go.")] = Path(
        "kif-demo"
    ),
    subject: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Another country that the demo has questions on."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Do the main job on a small model, and write a page.

    It is asked about a country, the country is mined and suppressed, it is asked again, and asked about others.

    Exit code 1 if the subject was not suppressed, or a neighbour was harmed.
    """
    outputs.check_folder(out)
    console = err() if json else stdout()
    try:
        results = _run(console, out, subject)
    except KeyboardInterrupt:
        raise KifError("interrupted; run the demo again") from None
    if json:
        print_json(results)
    if not results["passed"]:
        raise typer.Exit(1)


def _run(console: Console, folder: Path, subject: str | None) -> dict[str, Any]:
    begun = time.perf_counter()
    seconds: dict[str, float] = {}
    from kif_runtime.evaluation.facts import prior_probabilities

    from ..demonstration import FORMS, ask, compare, script
    from ..describing import summary
    from ..loading import attached, open_model
    from ..pages import demo_page
    from ..tracing import trace

    play = script(subject)
    _step(console, 1, "The model is loaded")
    model, tokenizer = open_model(MODEL)
    seconds["load"] = time.perf_counter() - begun
    size = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(f"  {MODEL_NAME}, {size:.0f} million parameters, on {model.device} ({seconds['load']:.1f} s)")

    _step(console, 2, f"It is asked about {play.subject}, and about its neighbours")
    with progress() as report:
        before = ask(model, tokenizer, play, report)
    priors = {form: [p or 0.0 for p in prior_probabilities(model, tokenizer, play.facts, form=form)] for form in FORMS}
    _print_before(console, play, before.texts, before.probabilities["bare"])

    _step(console, 3, f"The signature of {play.subject} is mined")
    capsule, seconds["mine"] = _mine(model, tokenizer, play.subject)
    console.print(f"  {summary(capsule)} ({seconds['mine']:.1f} s)")

    _step(console, 4, f"The same questions, with {play.subject} suppressed")
    with attached(model, [capsule]), progress() as report:
        after = ask(model, tokenizer, play, report)
    traces = trace(model, tokenizer, [capsule], play.traced)
    compared = compare(play, before, after, priors, traces)
    _print_texts(console, [row for row in compared["texts"] if row["about_subject"]])

    _step(console, 5, "The neighbours, with the same capsule")
    _print_texts(console, [row for row in compared["texts"] if not row["about_subject"]])

    _step(console, 6, "What was found")
    seconds["total"] = time.perf_counter() - begun
    results = _results(play.subject, capsule, seconds, compared)
    page = demo_page(results, capsule, traces)
    _print_checks(console, results)
    _write(console, folder, capsule, results, page)
    return results


def _mine(model: Any, tokenizer: Any, subject: str) -> "tuple[Capsule, float]":
    """The capsule and the seconds it took, not counting what is computed once per model."""
    from kif_runtime.mining import mine, prepare

    with progress() as report:
        prepare(model, tokenizer, progress=report)
        begun = time.perf_counter()
        capsule = mine(model, tokenizer, subject, progress=report)
    return capsule, time.perf_counter() - begun


def _results(subject: str, capsule: "Capsule", seconds: dict[str, float], compared: dict[str, Any]) -> dict[str, Any]:
    from kif_runtime import __version__

    from ..describing import describe

    return {
        "passed": compared["passed"],
        "subject": subject,
        "model": MODEL_NAME,
        "kif": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seconds": {what: round(value, 2) for what, value in seconds.items()},
        **compared,
        "capsule": describe(capsule),
    }


def _write(console: Console, folder: Path, capsule: "Capsule", results: dict[str, Any], page: str) -> None:
    outputs.make_folder(folder)
    file = folder / f"{capsule.id}.kif.safetensors"
    capsule.save(file, overwrite=True)
    outputs.write_json(folder / "results.json", results)
    outputs.write_text(folder / "report.html", page)
    console.print(f"  capsule  {file}")
    console.print(f"  figures  {folder / 'results.json'}")
    console.print(f"  page     {(folder / 'report.html').resolve().as_uri()}")


def _step(console: Console, number: int, what: str) -> None:
    console.print(Text.assemble((f"\n{number}/{STEPS}  ", "dim"), (what, "bold")))


def _print_before(console: Console, play: "Script", texts: list[str], probabilities: list[float]) -> None:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for name in ("asked", "said", "sure of the answer"):
        table.add_column(name, overflow="fold")
    for fact, text, p in zip([*play.facts, *play.neighbours], texts, probabilities, strict=True):
        said = " ".join(text.split())
        table.add_row(Text(fact.prompt), _marked(said, fact.answer, "bold green"), f"{fact.answer} {100 * p:.0f} %")
    console.print(table)


def _print_texts(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for name in ("asked", "before", "after"):
        table.add_column(name, overflow="fold")
    for row in rows:
        style = "bold red" if row["about_subject"] else "bold green"
        table.add_row(
            Text(row["prompt"]),
            _marked(row["before"], row["answer"], "bold green"),
            _marked(row["after"], row["answer"], style),
        )
    console.print(table)


def _marked(text: str, answer: str, style: str) -> Text:
    shown = Text(text)
    shown.highlight_words([answer], style, case_sensitive=False)
    return shown


def _print_checks(console: Console, results: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2), show_header=False)
    for check in results["checks"]:
        sign = Text("✓", "bold green") if check["passed"] else Text("✗", "bold red")
        table.add_row(sign, Text.assemble(check["text"], "\n", (check["detail"], "dim")))
    console.print(table)
    verdict = f"{results['subject']} is suppressed, and its neighbours are as they were."
    failed = "The demo did NOT show what it should; see the failed checks above."
    console.print()
    console.print(verdict if results["passed"] else failed, style="bold green" if results["passed"] else "bold red")
