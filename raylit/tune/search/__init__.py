"""Searches for a learning rate or a batch size.

Runs in the driver. Open `runner.py` first."""
