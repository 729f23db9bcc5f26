"""Collectives that the loops use beside the strategy's gradient synchronization.

Runs in the worker. Open `collectives.py` first.
"""
