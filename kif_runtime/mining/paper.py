"""The published recipe (arXiv 2601.10566), in the form the operator can express, for comparison.

Published: S⁺ and S⁻ are token means of prompts about the subject and about controls; each feature is z-scored over both
together, v = d/‖d‖ with d = mean(S⁺) − mean(S⁻), the layer chosen by a Cohen's-d-like effect size, up to three more
directions by PCA of what v leaves. At inference one capsule, picked by a text router, takes
h' = h − α σ(k(z − τ)) (h·v) v with z = (mean|h·v| − μ)/σ over the sequence, τ = 3.0, k = 1.6, α = 1.

Here instead: z is per token and signed, on the RMS-normalised state, μ and σ from the controls' tokens; no router.
Mended: v is mapped back from z-scored to residual coordinates before it is used there, and μ, σ are taken at the site
that is projected, where the original takes them from another layer. One direction, since the operator's gate belongs to
one detector. The sites compared are at fixed depths, on the subject's own prompts.
"""

import torch
from torch import Tensor

from ..capsule import Signature
from .control import Control
from .corpus import corpus
from .reading import Reader, normalised
from .subject import Subject

TAU, GATE_K = 3.0, 1.6
DEPTHS = (0.1, 0.3, 0.5, 0.7)
_CONTROLS, _TEMPLATES = 16, 8


def mine_paper(reader: Reader, control: Control, subject: Subject) -> Signature:
    """One soft-gated signature at the depth with the largest effect size."""
    data = corpus()
    templates = data.templates[subject.kind][:_TEMPLATES]
    forms = set(subject.forms)
    names = [e.name for e in control.entities if e.kind == subject.kind and e.name not in forms]
    names = names[:: max(1, len(names) // _CONTROLS)][:_CONTROLS]
    about = [t.replace("{}", f) for f in subject.forms for t in templates]
    others = [t.replace("{}", n) for n in names for t in templates[:4]]
    general = list(data.passages[::8])
    best: tuple[float, Signature] | None = None
    for site in dict.fromkeys(max(1, round(depth * len(reader.blocks))) for depth in DEPTHS):
        found = _signature(site, *(reader.states(texts, site) for texts in (about, others, general)))
        if best is None or found[0] > best[0]:
            best = found
    assert best is not None  # DEPTHS is not empty
    return best[1]


def _signature(site: int, about: list[Tensor], others: list[Tensor], general: list[Tensor]) -> tuple[float, Signature]:
    plus, minus = (torch.stack([normalised(x).mean(0) for x in rows]) for rows in (about, others))
    joint = torch.cat([plus, minus])
    deviation = joint.std(0).clamp_min(1e-6)
    direction = (plus.mean(0) - minus.mean(0)) / deviation  # in z-scored coordinates
    direction = direction * deviation  # and back in the residual's
    direction = direction / direction.norm()
    a, b = plus @ direction, minus @ direction
    effect = float((a.mean() - b.mean()) / ((a.var() + b.var()) / 2).sqrt().clamp_min(1e-6))
    tokens = torch.cat([normalised(x[1:]) for x in [*others, *general]]) @ direction  # no sinks
    mean, sigma = float(tokens.mean()), float(tokens.std().clamp_min(1e-6))
    fires = (tokens - mean) / sigma > TAU
    held = torch.cat([normalised(x) for x in about]) @ direction
    calibration = {
        "asked": 0.0,
        "measured": float(fires.float().mean()),
        "tokens": len(tokens),
        "recall": float(((held - mean) / sigma > TAU).float().mean()),
    }
    signature = Signature(
        site=site, role="mean", detector=(direction / sigma).contiguous(), bias=torch.tensor(-mean / sigma),
        basis=direction[None].contiguous(), target=torch.zeros(1), strength=torch.tensor(1.0),
        gate="soft", k=GATE_K, tau=TAU, calibration=calibration,
    )  # fmt: skip
    return effect, signature
