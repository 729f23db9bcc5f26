"""Classes that a user subclasses or holds: modules, data modules, results of steps, hyper-parameters.

Used in the driver and in the workers. Open `module.py` first.
"""
