"""Fits that run inside a Ray task, actor or trial.

This runs in the driver. Open `nested_fit.py` first.
"""
