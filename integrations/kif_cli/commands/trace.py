"""kif trace: where in a prompt the gate opens."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from kif_runtime.errors import KifError

from .. import options, outputs
from ..console import out, print_json

if TYPE_CHECKING:
    from ..tracing import Trace


def trace(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts.")],
    model: options.Model,
    capsule: options.Capsules = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page instead of colours.")] = None,
    chat: options.Chat = False,
    max_false_fire: options.MaxFalseFire = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Show on which tokens of a prompt the gate opens.

    Scores are relative to each signature's decision: over 0 it fires, and the token is edited.
    """
    if not capsule:
        raise KifError("a trace needs a capsule; give at least one with --capsule FILE")
    if html is not None:
        outputs.check_file(html)
        from ..pages import trace_page
    from ..loading import check_fit, load_capsules, open_model

    capsules = load_capsules(capsule)
    loaded, tokenizer = open_model(model, device=device)
    check_fit(capsules, capsule, loaded)
    from ..tracing import trace as run

    traces = run(loaded, tokenizer, capsules, prompts, chat=chat, max_false_fire=max_false_fire)
    if html is not None:
        outputs.write_text(html, trace_page(model, capsules, traces))
    if json:
        print_json({"model": model, "capsules": [c.id for c in capsules], "traces": [_values(t) for t in traces]})
    elif html is not None:
        out().print(f"written to {html}")
    else:
        for each in traces:
            _print(each)


def _values(trace: "Trace") -> dict[str, Any]:
    tokens = [{"text": text, "fired": fired} for text, fired in zip(trace.tokens, trace.fired, strict=True)]
    lines = [
        {
            "capsule": line.capsule,
            "signature": line.number,
            "site": line.site,
            "role": line.role,
            "scores": [round(score, 4) for score in line.scores],
        }
        for line in trace.lines
    ]
    return {"prompt": trace.prompt, "tokens": tokens, "signatures": lines}


def _print(trace: "Trace") -> None:
    text = Text()
    for t, (token, fired) in enumerate(zip(trace.tokens, trace.fired, strict=True)):
        line = trace.best(t)
        text.append(token, style=_style(line.scores[t] / line.typical, fired))
    out().print(text)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("token")
    table.add_column("score", justify="right")
    table.add_column("nearest signature")
    for t, (token, fired) in enumerate(zip(trace.tokens, trace.fired, strict=True)):
        line = trace.best(t)
        style = "bold red" if fired else ""
        which = f"{line.capsule}, {line.label}" + (", fires" if fired else "")
        table.add_row(Text(repr(token)[1:-1]), Text(f"{line.scores[t]:+.2f}", style), Text(which, style or "dim"))
    out().print(table)


def _style(level: float, fired: bool) -> str:
    if fired:
        return "bold white on red"
    return "on yellow" if level > -0.25 else ""
