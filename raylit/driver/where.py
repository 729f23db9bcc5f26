"""Whether a cluster is at hand, told without importing Ray. Driver."""

import os
import sys


def is_on_cluster() -> bool:
    """This process is connected to Ray already, or RAY_ADDRESS names a cluster."""
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and bool(ray.is_initialized()))
