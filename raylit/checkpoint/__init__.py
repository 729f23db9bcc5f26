"""Checkpoints: their contents, their files, and the search for the newest sound one.

Used in the driver and in the workers. Open `format.py` first."""
