"""Private names of torch, torchmetrics and Ray, each behind a small function. Any process.

No module outside this folder uses a name of another library that begins with an underscore. Open the file of the part
of the library that has changed: its functions say what raylit needs from it. `private_names.py` raises the error for a
missing name.
"""
