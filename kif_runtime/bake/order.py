"""What is drawn when: everything random in a step follows from the run's seed and the step's number."""

import hashlib

import torch


def seeded(seed: int, *what: object) -> torch.Generator:
    """A generator on the CPU for one purpose, independent of every other purpose's."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def drawn(seed: int, what: str, step: int, rows: int, count: int) -> list[int]:
    """The numbers, out of `count` examples, of the `rows` that step `step` sees: every example once in each epoch, in
    an order of its own."""
    order: dict[int, list[int]] = {}
    found = []
    for place in range(step * rows, (step + 1) * rows):
        epoch, index = divmod(place, count)
        if epoch not in order:
            order[epoch] = torch.randperm(count, generator=seeded(seed, what, epoch)).tolist()
        found.append(order[epoch][index])
    return found
