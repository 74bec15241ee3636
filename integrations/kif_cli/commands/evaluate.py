"""kif eval: the audit. What is forgotten, whether it is gone or only hidden, and what else changed; JSON and a page."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kif_runtime.errors import KifError
from kif_runtime.files import shown

from .. import options, outputs
from ..console import out, print_json, progress

if TYPE_CHECKING:
    from kif_runtime.evaluation.audit import Audit


class Suite(StrEnum):
    facts = "facts"
    neighbours = "neighbours"
    text = "text"
    dual = "dual"
    attacks = "attacks"
    tofu = "tofu"
    rwku = "rwku"
    utility = "utility"
    all = "all"


USUAL = (Suite.facts, Suite.neighbours, Suite.dual)
PARTS, NAMED = "parts", "parts-with-names"  # folders of what is measured so far, inside the output folder


def evaluate(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where results.json and report.html go.")
    ],
    capsule: options.Capsules = None,
    adapter: options.Adapter = None,
    erased_model: Annotated[
        str | None, typer.Option(metavar="M", help="Another model, which somebody erased, to judge instead.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="M", help="A model that never knew, to compare with, where there is one.")
    ] = None,
    suite: Annotated[
        list[Suite] | None,
        typer.Option(
            metavar="NAME",
            help="What to measure; give it again for more: facts, neighbours, text, dual, attacks, tofu, rwku, utility "
            "(all: the first five). Left out: facts, neighbours, dual, and text where there is some.",
        ),
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
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="SUITE=PATH", help="The data of a suite that brings none: tofu, rwku, utility."),
    ] = None,
    form: Annotated[options.Form, typer.Option(help="How facts are asked.")] = "bare",
    least_excess: Annotated[
        float, typer.Option(metavar="P", help="A fact is known where it is that much likelier than guessed.")
    ] = 0.15,
    quick: Annotated[bool, typer.Option("--quick", help="Ask less of everything.")] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=options.LARGEST_SEED, metavar="N", help="Of every random choice.")
    ] = 0,
    against: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Results of another evaluation, to show beside.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Limits, as JSON; exit code 1 where one is not kept.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(metavar="KEY", help="Write certificate.json, signed with this key; made if missing.")
    ] = None,
    with_names: Annotated[
        bool, typer.Option("--with-names", help="Leave names, questions and answers in what is written.")
    ] = False,
    max_false_fire: options.MaxFalseFire = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Audit an erasure: is it gone, or only hidden, and what did it cost?

    Exit code 1 where a policy is not kept. An audit that was stopped goes on where it was, in the same folder.
    """
    erasures = [bool(capsule) or adapter is not None, erased_model is not None]
    if sum(erasures) != 1:
        what = "two erasures at once" if all(erasures) else "nothing to evaluate"
        raise KifError(f"{what}; give an erasure with --capsule FILE or --adapter DIR, or another --erased-model M")
    if not least_excess > 0:
        raise KifError("--least-excess is how much likelier than guessed an answer has to be; give a number over 0")
    names = _suites(suite, text)
    outputs.check_folder(output)
    if certificate is not None and "facts" not in names:
        raise KifError("a certificate states a verdict; add --suite facts")
    from kif_runtime.evaluation.audit import Audit
    from kif_runtime.evaluation.policy import load_policy
    from kif_runtime.evaluation.suites import run_suites
    from kif_runtime.evaluation.suites import suite as known_suite

    from ..auditing import Compared, data_folders, read_given, states_of
    from ..loading import load_capsules
    from ..pages import eval_page
    from ..privacy import as_it_is, cleaner
    from ..results import load_results, print_results, results

    for name in names:
        known_suite(name)
    sets = data_folders(data)
    demands = load_policy(policy) if policy is not None else None
    beside = [(folder.name, load_results(folder)) for folder in against or ()]
    capsules = load_capsules(capsule)
    given = read_given(capsules, facts, neighbours, text if "text" in names else None)
    begun, processor = time.perf_counter(), time.process_time()
    with progress() as report:
        states = states_of(Compared(model, adapter, erased_model, reference, capsules, max_false_fire), capsule, device)
        audit = Audit(
            *states.both,
            states.tokenizer,
            given.subjects,
            given.facts,
            given.others,
            given.text,
            states.reference,
            sets,
            form=form,
            least_excess=least_excess,
            quick=quick,
            seed=seed,
            progress=report,
        )
        others = [fact.subject for fact in given.others]
        clean = as_it_is if with_names else cleaner(given.subjects, others, capsules)
        _check_known(audit, names, facts)
        tables = run_suites(audit, names, folder=output / (NAMED if with_names else PARTS), clean=clean)
    about = {
        "seconds": round(time.perf_counter() - begun, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "names": with_names,
        "model": model,
        "adapter": None if adapter is None else str(adapter),
        "erased_model": erased_model,
        "reference": reference,
        "max_false_fire": max_false_fire,
        "capsules": [{"id": c.id, "digest": c.digest, "bytes": c.nbytes} for c in capsules],
    }
    found = results(audit, tables, clean(about))
    if demands is not None and policy is not None:
        found["policy"] = _judged(demands, policy, found, tables)
    outputs.make_folder(output)
    outputs.write_json(output / "results.json", found)
    outputs.write_text(output / "report.html", eval_page(found, [(clean(label), other) for label, other in beside]))
    if certificate is not None:
        _certify(found, audit, output, certificate)
    if json:
        print_json(found)
    else:
        print_results(found)
        out().print(f"figures  {output / 'results.json'}")
        out().print(f"page     {(output / 'report.html').resolve().as_uri()}")
    if found["policy"] and not found["policy"]["passed"]:
        raise typer.Exit(1)


def _suites(chosen: Sequence[Suite] | None, text: Path | None) -> list[str]:
    """The names of the suites to run, in the order given. Raises KifError for one that lacks its text."""
    given = [Suite.text] if text is not None else []
    every = [*USUAL, *given, Suite.attacks]
    suites = [suite for one in chosen or (*USUAL, *given) for suite in (every if one is Suite.all else [one])]
    names = [suite.value for suite in dict.fromkeys(suites)]
    if "text" in names and text is None:
        raise KifError("the suite text needs running text; give --text FILE")
    return names


def _check_known(audit: "Audit", names: Sequence[str], facts: Path | None) -> None:
    """Raise KifError where the untouched model knows none of the facts: there was nothing to erase."""
    if not set(names) <= {"neighbours", "text", "utility"} and not audit.known():
        where = shown(facts) if facts else "the built-in file"
        raise KifError(
            f"the model knows none of the {len(audit.facts)} facts in {where}: no answer is {audit.least_excess:g} "
            "likelier than guessed; give facts that it knows, or a smaller --least-excess"
        )


def _judged(
    demands: Mapping[str, Any], file: Path, found: Mapping[str, Any], tables: Mapping[str, Any]
) -> dict[str, Any]:
    import hashlib

    from kif_runtime.evaluation.policy import judge

    if found["verdict"] is None:
        raise KifError("a policy judges a verdict; add --suite facts")
    checks = judge(demands, found["verdict"], tables)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"digest": digest, "passed": all(check["passed"] for check in checks), "checks": checks}


def _certify(found: Mapping[str, Any], audit: "Audit", folder: Path, key: Path) -> None:
    from ..certificate import certificate

    models = {state.name: hashlib.sha256(state.key.encode()).hexdigest() for state in audit.states}
    record = certificate(found, (folder / "results.json").read_bytes(), models, key)
    outputs.write_json(folder / "certificate.json", record)
