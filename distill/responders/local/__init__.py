"""A model on this machine answers."""
