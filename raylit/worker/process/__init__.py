"""Work of a worker's process besides training: output, logger calls, profiles, results, its reset between runs.

Runs in the worker. Open `result_sync.py` first.
"""
