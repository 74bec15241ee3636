"""Tiny random models of many families, capsules that fire on a chosen token, and a slow plain way to apply them."""

from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from kif_kernels import SiteTensors
from kif_kernels.suppress import reference
from kif_runtime import Capsule, Signature
from kif_runtime.blocks import decoder_blocks, width
from kif_runtime.fingerprint import fingerprint

VOCABULARY, WIDTH, BLOCKS, PAD = 64, 64, 4, 0
SLIDING = ("mistral", "gemma2", "gemma3_text")
CHANGES = {"opt": {"word_embed_proj_dim": WIDTH}} | {family: {"sliding_window": 6} for family in SLIDING}


@torch.no_grad()
def states(model, site, sequences):
    """What the decoder block at `site` gives for `sequences` [B, T] in the bare model: float64 [B, T, D]."""
    kept = []
    hook = decoder_blocks(model)[site].register_forward_hook(
        lambda module, args, output: kept.append((output[0] if isinstance(output, tuple) else output).double())
    )
    model(sequences)
    hook.remove()
    return kept[0]


def detector(model, site, token, rng):
    """(w, b) that fires on the states of `token` and of no other, in random contexts: a least-squares separation."""
    sequences = torch.randint(3, VOCABULARY, (96, 12), generator=rng)
    sequences[torch.rand(96, 12, generator=rng) < 0.15] = token
    x = states(model, site, sequences).flatten(0, 1)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    is_token = (sequences.flatten() == token).double()
    weight = (1 + 9 * is_token)[:, None]  # the token is rare
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design * weight, (2 * is_token - 1)[:, None] * weight).solution[:, 0]
    w, b = solution[:-1], solution[-1]
    score = x @ w + b
    low, high = score[is_token == 0].max(), score[is_token == 1].min()
    assert high > low, f"token {token} cannot be told from the others at block {site}; choose another"
    return w.float(), (b - (low + high) / 2).float()


def capsule(model, id, token, sites=(1,), rank=3, strength=1.0, soft=False):
    """A capsule that fires on `token` at each of `sites`, and moves it to a random target."""
    rng = torch.Generator().manual_seed(token)
    found = [(site, *detector(model, site, token, rng)) for site in sites]
    return make(model, id, found, rng, rank=rank, strength=strength, soft=soft)


def make(model, id, detectors, rng, rank=3, strength=1.0, soft=False):
    """A capsule from (site, w, b) for each of its signatures."""
    signatures = []
    for site, w, b in detectors:
        random = torch.randn(width(model), rank, generator=rng, dtype=torch.float64)
        basis = torch.linalg.qr(random)[0].T.float().contiguous()
        target = 6 * torch.randn(rank, generator=rng)  # far off, so that it shows in the text
        gate = {"gate": "soft", "k": 20.0, "tau": 0.0} if soft else {}
        signatures.append(Signature(site, "last", w, b, basis, target, torch.tensor(strength), **gate))
    return Capsule(id, tuple(signatures), fingerprint(model), width(model), len(decoder_blocks(model)))


@contextmanager
def plainly(model, *lists):
    """The same suppression by forward hooks and the kernels' reference: `lists` of capsules per input row."""
    blocks = decoder_blocks(model)
    found = {c.id: c for each in lists for c in each}
    hooks = []
    for site in {site for c in found.values() for site in c.sites}:
        own = [(id, s) for id in sorted(found) for s in found[id].by_site(site)]
        sizes = {"signatures": len(own), "rank": 8, "rows": len(lists), "set_length": len(own)}
        tensors = SiteTensors.empty(width=width(model), **sizes)
        for slot, (_, s) in enumerate(own):
            tensors.detector[slot], tensors.bias[slot], tensors.strength[slot] = s.detector, s.bias, s.strength
            tensors.basis[slot, : s.rank], tensors.target[slot, : s.rank] = s.basis, s.target
            tensors.owner[slot] = sorted(found).index(own[slot][0])
            if s.gate == "soft":
                tensors.k[slot], tensors.tau[slot] = s.k, s.tau
        tensors.used.fill_(len(own))
        for row, each in enumerate(lists):
            slots = [i for i, (id, _) in enumerate(own) if id in {c.id for c in each}]
            tensors.write_set(row, slots)

        def hook(module, args, output, tensors=tensors):
            x = output[0] if isinstance(output, tuple) else output
            rows = torch.arange(len(lists), dtype=torch.int32).repeat_interleave(x.shape[0] // len(lists))
            edited = reference.suppress(x, rows, tensors)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        hooks.append(blocks[site].register_forward_hook(hook))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def prompts(*rows, side="left"):
    """Token ids and mask of rows of different lengths, padded with the id PAD."""
    longest = max(map(len, rows))
    fill = [[PAD] * (longest - len(row)) for row in rows]
    ids = [f + list(r) if side == "left" else list(r) + f for f, r in zip(fill, rows, strict=True)]
    lengths, places = torch.tensor([[len(row)] for row in rows]), torch.arange(longest)
    real = places >= longest - lengths if side == "left" else places < lengths
    return {"input_ids": torch.tensor(ids), "attention_mask": real.long()}


@pytest.fixture(scope="session")
def hf(tiny_model):
    def tiny(family="llama", dtype=torch.float32, **changes):
        """A random model in which tokens influence each other and can still be told apart after a few blocks."""
        sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH}
        loose = {"initializer_range": 0.1, "tie_word_embeddings": False}
        model = tiny_model(family, **sizes | loose | CHANGES.get(family, {}) | changes)
        torch.nn.init.normal_(model.get_input_embeddings().weight, generator=torch.Generator().manual_seed(1))
        return model.to(dtype)

    @cache
    def ready(family, dtype=torch.float32):
        """A model, not to be changed, and two capsules: 'five' for token 5 at blocks 1, 2; 'nine', soft, for 9 at 2."""
        model = tiny(family, dtype)
        return model, capsule(model, "five", 5, (1, 2)), capsule(model, "nine", 9, (2,), soft=True, strength=0.8)

    return SimpleNamespace(
        ready=ready,
        tiny=tiny,
        capsule=capsule,
        make=make,
        plainly=plainly,
        prompts=prompts,
        states=states,
        PAD=PAD,
        BLOCKS=BLOCKS,
    )


@pytest.fixture(scope="session")
def llama(hf):
    """A Llama and the two capsules of `hf.ready`."""
    return hf.ready("llama")
