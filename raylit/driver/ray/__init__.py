"""Workers as Ray actors: resource requests, start, messages, failures and end.

This runs in the driver, except `actor.py`, which runs in the worker's process. Open `actor_group.py` first.
"""
