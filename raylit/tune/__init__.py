"""Searches for a learning rate or a batch size, and sweeps, on Ray Tune.

Runs in the driver. Open `tuner.py` for the Tuner's searches, `sweep/sweep.py` for sweeps.
"""
