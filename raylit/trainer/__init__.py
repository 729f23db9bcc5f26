"""The Trainer: its arguments, its entry points and what it knows after a run.

Runs in the driver. Open `trainer.py` first."""
