"""Searches for a learning rate or a batch size.

Runs in the driver. Open `trial.py` first, which has the interface of a search, then `runner.py`.
"""
