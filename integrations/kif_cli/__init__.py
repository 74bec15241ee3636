"""The kif command."""
