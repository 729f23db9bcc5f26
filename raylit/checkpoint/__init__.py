"""Contents, files and index of checkpoints, and the search for the newest usable one.

Used in the driver and in the workers. Open `format.py` first.
"""
