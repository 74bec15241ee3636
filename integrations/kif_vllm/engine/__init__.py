"""What runs in the engine core: which capsules there are, which apply to a request, and the proof that they do."""
