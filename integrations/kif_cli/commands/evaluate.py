"""kif eval: what is forgotten and what else changed, as JSON and a page."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kif_runtime.errors import CapsuleError, KifError
from kif_runtime.files import reason, shown
from kif_runtime.ids import slug

from .. import options, outputs
from ..console import out, print_json, progress

if TYPE_CHECKING:
    from kif_runtime import Capsule
    from kif_runtime.evaluation.facts import Fact


class Suite(StrEnum):
    facts = "facts"
    neighbours = "neighbours"
    text = "text"


OWN_FACTS = Path(__file__).parent.parent / "data" / "facts.jsonl"


def evaluate(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where results.json and report.html go.")
    ],
    capsule: options.Capsules = None,
    adapter: options.Adapter = None,
    suite: Annotated[
        list[Suite] | None,
        typer.Option(help="What to measure; give it again for more. All that has data, if left out."),
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON lines: subject, prompt, answer. A few about countries are built in."),
    ] = None,
    neighbours: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Facts about others. Without it, those in --facts not about the capsules."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Running text, for perplexity and false fires.")
    ] = None,
    form: Annotated[options.Form, typer.Option(help="How facts are asked.")] = "bare",
    max_false_fire: options.MaxFalseFire = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Measure what is forgotten, and what else changed.

    Knowledge kept, neighbours and running text, before and after an erasure.
    """
    if not capsule and adapter is None:
        raise KifError("nothing to evaluate; give an erasure with --capsule FILE or --adapter DIR")
    suites = set(suite or [s for s in Suite if text is not None or s is not Suite.text])
    if Suite.text in suites and text is None:
        raise KifError("the suite text needs running text; give --text FILE")
    outputs.check_folder(output)
    from ..loading import attached, check_fit, load_capsules, open_model
    from ..pages import eval_page

    capsules = load_capsules(capsule)
    about, others = _split(capsules, facts, neighbours)
    passage = _read(text) if Suite.text in suites and text else None
    loaded, tokenizer = open_model(model, adapter=adapter, device=device)
    check_fit(capsules, capsule or (), loaded)
    from kif_runtime.evaluation.run import evaluate as measure

    @contextmanager
    def erased() -> Iterator[Any]:
        with _with_adapter(loaded, adapter), attached(loaded, capsules, max_false_fire) as kif:
            yield kif

    begun = time.perf_counter()
    with _without_adapter(loaded, adapter), progress() as report:
        others = others if Suite.neighbours in suites else []
        table = measure(
            loaded, tokenizer, erased, facts=about, neighbours=others, text=passage, form=form, progress=report
        )
    results = _results(model, adapter, capsules, max_false_fire, sorted(suites), table, time.perf_counter() - begun)
    outputs.make_folder(output)
    outputs.write_json(output / "results.json", results)
    outputs.write_text(output / "report.html", eval_page(results))
    if json:
        print_json(results)
    else:
        _print(table)
        out().print(f"figures  {output / 'results.json'}")
        out().print(f"page     {(output / 'report.html').resolve().as_uri()}")


def _split(
    capsules: "Sequence[Capsule]", facts: Path | None, neighbours: Path | None
) -> "tuple[list[Fact], list[Fact]]":
    """Facts about what is erased, and about others. Public ids tell which is which."""
    from kif_runtime.evaluation.facts import load_facts

    found = load_facts(facts or OWN_FACTS)
    if neighbours is not None:
        return found, load_facts(neighbours)
    ids = {id for c in capsules for id in (c.id, *(slug(name) for name in (c.name, *c.aliases) if name))}
    about = [fact for fact in found if _id(fact) in ids]
    if not about:
        where = f"no fact in {shown(facts)}" if facts else "no built-in fact"
        raise KifError(
            f"{where} is known to be about what is erased; give those facts with --facts FILE, others with --neighbours"
        )
    return about, [fact for fact in found if _id(fact) not in ids]


def _id(fact: "Fact") -> str | None:
    """The id that a public capsule of the fact's subject has."""
    try:
        return slug(fact.subject)
    except CapsuleError:  # no letter in it
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise KifError(f"cannot read {shown(path)}: it is not UTF-8 text; convert it") from None
    except OSError as failure:
        raise KifError(f"cannot read {shown(path)}: {reason(failure)}") from None


@contextmanager
def _without_adapter(model: Any, adapter: Path | None) -> Iterator[None]:
    """'Before' is the model without its adapter."""
    if adapter is not None:
        model.base_model.disable_adapter_layers()
    yield


@contextmanager
def _with_adapter(model: Any, adapter: Path | None) -> Iterator[None]:
    if adapter is None:
        yield
        return
    model.base_model.enable_adapter_layers()
    try:
        yield
    finally:
        model.base_model.disable_adapter_layers()


def _results(
    model: str,
    adapter: Path | None,
    capsules: "Sequence[Capsule]",
    max_false_fire: float | None,
    suites: list[str],
    table: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    from kif_runtime import __version__

    return {
        "kif": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "model": model,
        "adapter": None if adapter is None else str(adapter),
        "max_false_fire": max_false_fire,
        "capsules": [{"id": c.id, "digest": c.digest, "bytes": c.nbytes} for c in capsules],
        "suites": suites,
        **table,
    }


def _print(table: dict[str, Any]) -> None:
    rows: list[tuple[str, str]] = []
    for key, what in (
        ("kept", "knowledge kept"),
        ("kept_first", "  name at the start"),
        ("kept_later", "  name later"),
    ):
        found = table[key]
        if "mean" in found:
            low, high = found["interval"]
            rows.append((what, f"{found['mean']:+.3f}  [{low:+.3f}, {high:+.3f}]  over {found['facts']} facts"))
            rows.append(("  beyond ±0.2", f"{100 * found['beyond']:.1f} %"))
        elif key == "kept":
            rows.append((what, f"no fact was known beforehand (excess of at least {table['least_excess']:g})"))
    if found := table["neighbours"]:
        rows.append(("neighbours, mean |Δp|", f"{found['mean']:.5f}  over {found['facts']} facts"))
    if found := table["text"]:
        rows.append(
            ("perplexity", f"{found['before']:.3f} → {found['after']:.3f}  ({100 * (found['ratio'] - 1):+.3f} %)")
        )
        if found["touched_share"] is not None:
            rows.append(("tokens touched", f"{found['touched_share']:.2e} of {found['tokens']:,}"))
    grid = Table.grid(padding=(0, 2))
    for what, value in rows:
        grid.add_row(what, value)
    out().print(grid)
