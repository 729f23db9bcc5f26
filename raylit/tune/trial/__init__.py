"""One trial of a sweep, in a Ray Tune trainable.

Runs in the trial's actor; `run_trials.py`, `resources.py` and `progress.py` run in the driver. Open `trainable.py`
first.
"""
