"""Searches and sweeps on Ray Tune.

Runs in the driver. `tuner.py` is the Tuner, `sweep/sweep.py` the sweep."""
