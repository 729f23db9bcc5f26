"""The workers as Ray actors: resources, start, messages, failures and end.

Runs in the driver, but for `actor.py`, which runs in the worker's process. Open `actor_group.py` first."""
