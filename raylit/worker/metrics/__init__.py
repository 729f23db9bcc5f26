"""What `self.log` is given, until it is reported: buffered on the device, reduced over the ranks.

Runs in the worker. Open `buffer.py` first."""
