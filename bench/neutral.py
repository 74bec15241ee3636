"""Learn a model's neutral direction with many steps and put it where mining finds it, keyed by the model's fingerprint.

`python bench/neutral.py [--model MODEL] [--site L] [--steps N] [--out FILE]`. The one that ships for the embedded model
was made by this recipe with 150 steps, before this script measured the usual norm itself (90 was given, 89.1 measured),
on one thread of a shared machine in 16 minutes. Other models learn theirs on first use, in fewer steps.
"""

import argparse
import random
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from kif_runtime import load_model
from kif_runtime.fingerprint import fingerprint
from kif_runtime.mining import neutral
from kif_runtime.mining.control import SHIPPED, default_site
from kif_runtime.mining.corpus import corpus
from kif_runtime.mining.reading import Prompt, Reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--site", type=int)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    reader, data, rng = Reader(model, tokenizer), corpus(), random.Random(0)
    site = default_site(len(reader.blocks)) if args.site is None else args.site
    with Progress() as bar:
        task = bar.add_task("learning", total=len(data.kinds) + args.steps)
        known = {}
        for kind in data.kinds:
            known[kind] = neutral.references(reader, data, kind, rng)
            bar.advance(task)
        scale = usual_norm(reader, site)
        vector = neutral.learn(
            reader, data, known, site, scale=scale, steps=args.steps, tick=lambda n: bar.advance(task, n)
        )
    there = load_file(args.out) if args.out.exists() else {}
    save_file(there | {f"{fingerprint(model)}.{site}": vector.contiguous()}, args.out)


def usual_norm(reader: Reader, site: int) -> float:
    """Median norm of a control entity's last name token."""
    prompts = [Prompt.of(t, e.name) for e, t in zip(corpus().entities, corpus().templates["any"] * 40, strict=False)]
    states, spans = reader.states([p.text for p in prompts], site), reader.name_tokens(prompts)
    return float(torch.stack([x[s[-1]] for x, s in zip(states, spans, strict=True)]).norm(dim=1).median())


if __name__ == "__main__":
    main()
