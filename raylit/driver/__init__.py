"""Driver process: decides what the workers do between two steps and acts on their reports.

`loop/` makes the decisions, `ray/` starts and monitors the workers, `tune_integration.py` serves a fit that runs inside
Ray Tune. Open `loop/coordinator.py` first.
"""
