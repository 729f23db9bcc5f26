"""Reach into torch's DataLoader. Worker.

Written against torch 2.13, tested with torch 2.9.1 too.
"""

from typing import Any

from torch.utils.data import DataLoader


def drop_iterator(loader: "DataLoader[Any]") -> None:
    """Have a loader with persistent processes start others for its next iteration; those of a copy are not its own."""
    vars(loader)["_iterator"] = None
