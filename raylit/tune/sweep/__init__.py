"""Sweep over hyper-parameters: its settings, its result, tables and figures.

Runs in the driver. Open `sweep.py` first.
"""
