"""The settings of a run: frozen, validated, sent to every worker as they are.

Made in the driver from the Trainer's arguments. Open `plan.py` first."""
