"""kif sites: at which block a model's subjects are best suppressed."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kif_runtime.errors import KifError

from .. import options
from ..console import out, print_json, progress

if TYPE_CHECKING:
    from kif_runtime.mining import SiteScore


def sites(
    model: options.Model,
    site: Annotated[
        list[int] | None, typer.Option(metavar="L", help="A block to try; give it again for more (default: seven).")
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Gradient steps at each block.")] = 60,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Try a model's blocks as sites, once for a model new to KIF.

    Mining works at one block, by default a tenth of the way up. This validates others on names and prompts held out:
    what is left of a suppressed name's knowledge, what others named in the same text lose, and how well names are told
    apart. Mine with `--site` where another is better.
    """
    from ..loading import open_model

    try:
        loaded, tokenizer = open_model(model, device=device)
        from kif_runtime.mining import best_site, validate_sites

        with progress() as report:
            scores = validate_sites(loaded, tokenizer, site, steps=steps, progress=report)
    except KeyboardInterrupt:
        raise KifError("interrupted; nothing found yet") from None
    best = best_site(scores)
    if json:
        print_json({"best": best.site, "sites": [asdict(s) | {"kept": s.kept, "loss": s.loss} for s in scores]})
    else:
        out().print(_table(scores, best))
        out().print(f"best: kif mine --site {best.site}")


def _table(scores: "list[SiteScore]", best: "SiteScore") -> Table:
    table = Table(
        "site", "kept", "left, nats", "harm to others, nats", "both", "names told apart", box=None, pad_edge=False
    )
    for s in scores:
        figures = (f"{s.kept:.0%}", f"{s.left:.3f}", f"{s.harm:.3f}", f"{s.loss:.3f}", f"{s.recall:.1%}")
        table.add_row(str(s.site), *figures, style="bold" if s is best else None)
    return table
