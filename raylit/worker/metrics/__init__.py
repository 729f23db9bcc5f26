"""Metrics from `self.log` until they are reported: buffered on the device, reduced over the ranks.

Runs in the worker. Open `buffer.py` first.
"""
