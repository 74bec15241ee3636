"""The pages: self-contained HTML, no script, nothing fetched. One base template, and macros that the pages share."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from kif_runtime import __version__
from kif_runtime.errors import KifError

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape
except ImportError:
    raise KifError("pages need jinja2; install it with: pip install 'kif-runtime[report]'") from None

from .describing import describe, quality
from .picture import bars, charts, numbers
from .picture import shown as figure_shown
from .results import compared

if TYPE_CHECKING:
    from kif_runtime import Capsule

    from .tracing import Trace

DRAWN = frozenset({"facts", "neighbours", "text", "dual", "attacks"})  # suites that the page has a place for
FAINTEST = 0.06  # heat below which a token is left uncoloured


def demo_page(results: dict[str, Any], capsule: "Capsule", traces: "Sequence[Trace]") -> str:
    """`results`: what kif demo writes as results.json."""
    facts = {"r": results, "capsule": describe(capsule), "quality": quality(capsule.calibration)}
    return _render("demo.html.jinja", **facts, heat=[heat(trace) for trace in traces])


def eval_page(
    results: dict[str, Any], beside: "Sequence[tuple[str, Mapping[str, Any]]]" = (), label: str = "this one"
) -> str:
    """`results`: what kif eval writes as results.json. beside: (label, results) of other models, for comparison with
    this one, which has `label`."""
    tables = [results[name] for name in results["suites"] if name != "facts"]
    return _render(
        "eval.html.jinja",
        r=results,
        groups=bars(results["figures"]),
        charts=charts(results.get("dual")),
        columns=compared([(label, results), *beside]) if beside else [],
        rest={name: numbers(results[name]) for name in results["suites"] if name not in DRAWN},
        attacks=[attack for table in tables for attack in table.get("attacks") or ()],
    )


def trace_page(model: str, capsules: "Sequence[Capsule]", traces: "Sequence[Trace]") -> str:
    fired = sum(any(trace.fired) for trace in traces)
    return _render(
        "trace.html.jinja",
        model=model,
        capsules=[describe(capsule) for capsule in capsules],
        heat=[heat(trace) for trace in traces],
        fired=fired,
    )


def heat(trace: "Trace") -> dict[str, Any]:
    """A trace as cells to colour: per token the nearest signature, and the whole table of signatures by tokens."""
    fired = trace.fired
    tokens = []
    for t, text in enumerate(trace.tokens):
        line = trace.best(t)
        level = line.scores[t] / line.typical
        tokens.append({"text": visible(text), "fired": fired[t], "score": line.scores[t], "heat": _heat(level)}
                      | {"which": f"{line.capsule}, {line.label}"})  # fmt: skip
    lines = [
        {
            "label": line.label,
            "capsule": line.capsule,
            "cells": [
                {"score": score, "fired": score > 0, "heat": _heat(score / line.typical)} for score in line.scores
            ],
        }
        for line in trace.lines
    ]
    return {"prompt": trace.prompt, "tokens": tokens, "lines": lines, "count": sum(fired)}


def _heat(level: float) -> float:
    """Opacity in [0, 1] of a score in units of its typical one: 0 a whole unit under the decision, 1 at a unit over."""
    value = min(1.0, max(0.0, (level + 1.0) / 2.0))
    return round(value, 3) if value > FAINTEST else 0.0


def visible(token: str) -> str:
    """A token's text with its white space made visible, since a cell shows it alone."""
    shown = token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "")
    return shown.strip() or (shown.replace(" ", "␣") or "∅")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("kif_cli", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "signed": signed, "marked": marked, "figure": figure}
    environment.globals["shown"] = figure_shown
    environment.globals["version"] = __version__
    return environment


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(**values)


def percent(value: float) -> str:
    """A probability as a reader takes it in: 70 %, 0.4 %, under 0.1 %."""
    if 0 < value < 0.001:
        return "< 0.1 %"
    return f"{100 * value:.1f} %" if 0 < value < 0.1 else f"{100 * value:.0f} %"


def signed(value: float) -> str:
    """With a true minus, which is as wide as the plus."""
    return f"{value:+.2f}".replace("-", "−")


def figure(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def marked(text: str, answer: str) -> Markup:
    """`text` with every place where `answer` stands marked, whatever the case."""
    at = text.lower().find(answer.lower()) if answer else -1
    if at < 0:
        return escape(text)
    end = at + len(answer)
    return escape(text[:at]) + Markup("<mark>{}</mark>").format(text[at:end]) + marked(text[end:], answer)
