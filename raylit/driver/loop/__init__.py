"""The driver's loop: validation, saves, logs and stops, in the order in which they are due.

Runs in the driver and does not import Ray. Open `coordinator.py` first."""
