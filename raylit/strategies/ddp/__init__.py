"""Distributed data parallel training: every rank holds the whole model, gradients are averaged.

Runs in the worker. Open `strategy.py` first.
"""
