"""One file per command. None imports torch before it runs, so that `kif --help` answers at once."""
