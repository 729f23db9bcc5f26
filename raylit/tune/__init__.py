"""Many trainings as the trials of one Ray Tune run: sweeps, and what searches build on. Ray's own tune is imported only
when one starts."""
