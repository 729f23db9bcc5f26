"""The driver: it decides what the workers do between two steps, and acts on what they report.

`loop/` decides, `ray/` starts and watches the workers, `tune_integration/` is for a fit within Ray Tune."""
