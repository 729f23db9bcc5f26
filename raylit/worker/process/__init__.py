"""What a worker's process does beside training: output, logger calls, profiles, results, and its reset between runs.

Runs in the worker. Open `result_sync.py` first."""
