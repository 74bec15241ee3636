"""kif generate: a model's text with capsules attached, and what they fired on."""

from typing import Annotated, Any

import typer

from kif_runtime.errors import KifError

from .. import options
from ..console import err, out, print_json


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts.")],
    model: options.Model,
    capsule: options.Capsules = None,
    adapter: options.Adapter = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="How much text at most.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens at random, not the likeliest.")] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, max=options.LARGEST_SEED, metavar="S", help="Makes --sample repeatable.")
    ] = None,
    chat: options.Chat = False,
    max_false_fire: options.MaxFalseFire = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Generate text with subjects suppressed.

    Each prompt is run alone. What fired is counted in tokens, prompt and text together.
    """
    if seed is not None and not sample:
        raise KifError("--seed means something only with --sample; give both")
    from ..answers import How, answer, encode
    from ..loading import attached, check_fit, load_capsules, open_model

    capsules = load_capsules(capsule)  # a bad file is refused before the model is loaded
    loaded, tokenizer = open_model(model, adapter=adapter, device=device)
    check_fit(capsules, capsule or (), loaded)
    how = How(max_new_tokens, sample, seed, chat)
    for prompt in prompts:  # all of them before any work
        encode(loaded, tokenizer, prompt, chat=chat, room=max_new_tokens)
    results: list[dict[str, Any]] = []
    with attached(loaded, capsules, max_false_fire) as kif:
        for prompt in prompts:
            if kif is not None:
                kif.reset()
            text = answer(loaded, tokenizer, prompt, how)
            results.append({"prompt": prompt, "text": text, "fired": {} if kif is None else kif.fired})
            if not json:
                _print(results[-1], many=len(prompts) > 1)
    if json:
        print_json({"model": model, "capsules": [c.id for c in capsules], "results": results})


def _print(result: dict[str, Any], *, many: bool) -> None:
    if many:
        out().print(f"> {result['prompt']}", style="bold")
    out().print(result["text"].strip("\n"))
    fired = [f"{id} on {count} token{'s' if count > 1 else ''}" for id, count in result["fired"].items() if count]
    if result["fired"]:
        err().print(f"fired: {', '.join(fired) or 'nothing'}", style="dim")
