"""Baking: what capsules suppress becomes a standard PEFT LoRA adapter."""
