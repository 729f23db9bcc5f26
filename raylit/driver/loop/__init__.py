"""The driver's loop: runs training, validation, saves and logging in the order in which they are due.

It runs in the driver and does not import Ray. Open `coordinator.py` first.
"""
