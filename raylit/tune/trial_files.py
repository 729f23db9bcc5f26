"""A trial's checkpoint: the run's own file, and the config it was trained with. Driver, and trials' processes."""

import os
from collections.abc import Mapping
from typing import Any

import cloudpickle

from raylit.places import file_system, is_url

CHECKPOINT = "trial.ckpt"
_CONFIG = "config.pkl"


def write_config(config: Mapping[str, Any], directory: str) -> None:
    with open(os.path.join(directory, _CONFIG), "wb") as file:
        cloudpickle.dump(dict(config), file)


def config_of(checkpoint: str) -> dict[str, Any]:
    """Of a trial's checkpoint, by its path or URL. It is unpickled: for one's own sweeps."""
    path = checkpoint.removesuffix(CHECKPOINT) + _CONFIG
    if is_url(path):
        files, place = file_system(path)
        return cloudpickle.loads(files.cat_file(place))
    with open(path, "rb") as file:
        return cloudpickle.load(file)
