"""A small sparse autoencoder, trained on the spot on one site's states.

Top-k: the k largest pre-activations of each state are kept. Source: Gao et al. (arXiv 2406.04093), without the
auxiliary loss; a quarter of a minute's training on one core, not a published dictionary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import KifError


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """encoder [F, D], decoder [F, D] with unit rows, bias [D] and scale: states are read as (x − bias) / scale."""

    encoder: Tensor
    decoder: Tensor
    bias: Tensor
    scale: float
    k: int

    def features(self, states: Tensor) -> Tensor:
        """[…, F] activations of states […, D], at most k of a state above 0."""
        raw = ((states.float() - self.bias) / self.scale) @ self.encoder.T
        top = raw.topk(self.k, -1)
        return torch.zeros_like(raw).scatter(-1, top.indices, top.values.relu())

    def written(self, features: Tensor) -> Tensor:
        """[…, D]: what activations […, F] add to the stream."""
        return features @ self.decoder * self.scale

    def unexplained(self, states: Tensor) -> float:
        """The share of the variance of states [N, D] that the features do not reconstruct."""
        left = states.float() - self.bias - self.written(self.features(states))
        return float(left.square().sum() / (states.float() - states.float().mean(0)).square().sum())


def train_sae(
    states: Tensor, *, features: int, k: int = 16, steps: int = 300, batch: int = 512, rate: float = 2e-3, seed: int = 0
) -> SparseAutoencoder:
    """states [N, D]. Adam on the squared error of batches drawn at random. Raises KifError for fewer than 2 states."""
    if len(states) < 2:
        raise KifError("a sparse autoencoder needs states to learn from; give a longer text")
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        data = states.detach().float().cpu().clone()
        bias, scale = data.mean(0), float((data - data.mean(0)).norm(dim=1).mean())
        data = (data - bias) / scale
        start = torch.nn.functional.normalize(torch.randn(features, data.shape[1], generator=generator), dim=1)
        encoder, decoder = start.clone().requires_grad_(True), start.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([encoder, decoder], lr=rate)
        for _ in range(steps):
            x = data[torch.randint(len(data), (min(batch, len(data)),), generator=generator)]
            found = SparseAutoencoder(encoder, decoder, torch.zeros_like(bias), 1.0, min(k, features))
            loss = (found.written(found.features(x)) - x).square().sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                decoder.copy_(torch.nn.functional.normalize(decoder, dim=1))
    return SparseAutoencoder(encoder.detach(), decoder.detach(), bias, scale, min(k, features))
