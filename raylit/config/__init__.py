"""The settings of a run: frozen dataclasses, validated in the driver and sent to every worker unchanged.

The driver builds them from the Trainer's arguments. Open `plan.py` first.
"""
