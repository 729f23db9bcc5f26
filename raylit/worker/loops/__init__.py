"""The loops over batches, and the hooks that they call.

Runs in the worker. Open `train.py` first.
"""
