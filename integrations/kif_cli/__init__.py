"""The `kif` command: the front door, and the only room that knows all the others."""
