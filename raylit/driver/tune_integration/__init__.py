"""A fit that runs within a task, an actor or a trial of Ray's.

Runs in the driver. Open `nested_fit.py` first."""
