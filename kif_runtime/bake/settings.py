"""How to train: what an objective proposes and its user may change."""

from dataclasses import dataclass

ALL, ATTENTION, MLP = "all", "attention", "mlp"


@dataclass(frozen=True)
class Settings:
    """rank, alpha: of the LoRA (its scale is alpha ÷ rank). blocks: how many blocks, from the first on, get one; None:
    every block. targets: `all`, `attention` or `mlp` projections, or names such as `down_proj`.

    learning_rate: of AdamW, with linear warm-up over `warmup` steps and then linear decay to a tenth. steps: at most.
    forget_rows, retain_rows: examples of each in a step, over all processes. clip: the largest norm of a gradient.
    Every `validate_every` steps the ratios on held-out text are measured; training ends where forget is at most
    `enough`, and retain a quarter of it.
    """

    rank: int = 8
    alpha: float = 16.0
    blocks: int | None = None
    targets: tuple[str, ...] = (ALL,)
    learning_rate: float = 1e-3
    warmup: int = 5
    steps: int = 100
    forget_rows: int = 8
    retain_rows: int = 8
    clip: float = 1.0
    validate_every: int = 20
    checkpoint_every: int = 10
    enough: float = 0.1
