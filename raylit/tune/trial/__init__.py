"""One trial of a sweep, in a Ray Tune trainable.

Runs in the trial's actor, but for `run_trials.py` and `progress.py`. Open `trainable.py` first."""
