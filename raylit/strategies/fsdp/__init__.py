"""Fully sharded data parallel training (FSDP2): every rank holds a shard of each parameter.

Runs in the worker. Open `strategy.py` first.
"""
