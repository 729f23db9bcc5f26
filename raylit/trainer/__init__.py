"""The Trainer: its arguments, its entry points, and its state after a run.

Runs in the driver. Open `trainer.py` first.
"""
