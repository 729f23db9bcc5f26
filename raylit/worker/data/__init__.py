"""Batches: from the user's loaders, shared out over the ranks, to the device.

Runs in the worker. Open `train_data.py` first.
"""
