"""Checkpoints: what is in one (format) and how it gets to disk and back (files). Both sides."""
