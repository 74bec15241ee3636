"""Options that several commands share, so that they read the same everywhere."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[str, typer.Option("--model", "-m", metavar="M", help="A folder, a hub id, or 'embedded'.")]
Capsules = Annotated[
    list[Path] | None,
    typer.Option("--capsule", "-c", metavar="FILE", help="A capsule to suppress; give it again for more."),
]
Adapter = Annotated[Path | None, typer.Option(metavar="DIR", help="A PEFT adapter to put on the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Chat = Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")]
MaxFalseFire = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Largest share of tokens that may fire; thresholds are tightened for it."),
]
Device = Annotated[str | None, typer.Option(metavar="D", help="cpu or cuda; the GPU if there is one.")]
LARGEST_SEED = 2**63 - 1  # torch takes no larger one
Form = Literal["bare", "chat"]
