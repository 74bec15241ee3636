"""A baking of the tiny model in a process of its own, to be killed, resumed or launched: running.py FOLDER OUT."""

import sys
from pathlib import Path

from kif_runtime import Capsule
from kif_runtime.bake import bake
from kif_runtime.bake.objectives.capsule import CapsuleObjective

SETTINGS = {"rank": 2, "alpha": 4.0, "blocks": 2, "steps": 6, "forget_rows": 2, "retain_rows": 2, "enough": 0.0,
            "validate_every": 2, "checkpoint_every": 1}  # fmt: skip


def main(folder: Path, out: Path) -> None:
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    capsule = Capsule.load(folder / "one.kif.safetensors")
    bake(
        model, tokenizer, [capsule], out, names={capsule.id: ["Zembla"]}, settings=SETTINGS,
        objective=CapsuleObjective(start=False), accelerator=Accelerator(cpu=True),
        progress=lambda done, total, what: print(done, flush=True),
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
