"""Baking: what capsules suppress becomes a standard PEFT LoRA adapter."""

from .api import Baked, bake
from .data import own_examples

__all__ = ["Baked", "bake", "own_examples"]
