"""The worker: it runs the module's hooks over its share of the data, and never imports Ray.

Runs in an actor, or in the driver's process with `num_workers=0`. Open `worker.py` first, then `loops/train.py`.
"""
