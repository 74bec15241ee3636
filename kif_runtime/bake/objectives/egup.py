"""EGUP: how hard each sample is forgotten, and where forgetting stops.

Source: arXiv 2508.20443, of which we know: weights grow with a forget sample's similarity to the retain set's mean
embedding (what is entangled needs more effort); a sample's own representation shift lowers its weight; a proxy of the
expected output after unlearning bounds the forgetting softly. The functions were chosen here: a softmax over the batch,
the cosine that is left, a hinge. The proxy is the capsule at work, which is what the model should say afterwards.
An embedding is the mean of the last hidden states over a sample's tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .tokens import wide


def embedding(states: Tensor, mask: Tensor) -> Tensor:
    """[B, D]: mean of states [B, T, D] where mask [B, T] is True."""
    weight = mask.to(torch.float32)[..., None]
    return (wide(states) * weight).sum(1) / weight.sum(1).clamp_min(1)


def entanglement(forget: Tensor, retain: Tensor, temperature: float = 0.2) -> Tensor:
    """B · softmax(cos(e_i, mean of retain) ÷ temperature) [B], of mean 1. forget [B, D], retain [M, D]: embeddings."""
    near = cosine_similarity(forget, retain.mean(0, keepdim=True))
    return (near / temperature).softmax(0) * len(near)


def remaining(now: Tensor, before: Tensor) -> Tensor:
    """[B] in [0, 1]: the cosine of a sample's embedding with its own in the untouched model, 0 where it turned away."""
    return cosine_similarity(now, before).clamp_min(0)


def weights(forget: Tensor, reference: Tensor, retain: Tensor) -> Tensor:
    """Weights [B], without gradient: entanglement in the untouched model times what remains of each sample.

    forget, reference [B, D]: embeddings by the student and by the untouched model; retain [M, D], untouched.
    """
    return (entanglement(reference, retain) * remaining(forget, reference)).detach()


def overshoot(student: Tensor, proxy: Tensor) -> Tensor:
    """max(0, log p_proxy(y) − log p(y)) [B] from mean log-probabilities [B]: only pushing below the proxy costs."""
    return (proxy - student).clamp_min(0)
