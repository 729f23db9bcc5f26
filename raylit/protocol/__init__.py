"""Every type that crosses between the driver and the workers.

Frozen dataclasses of plain values, CPU tensors and paths. Open `messages.py` first.
"""
