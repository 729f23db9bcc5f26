"""seed_everything: one seed for Python, NumPy and torch. Both sides."""

import os
import random
import sys

import torch

from raylit.errors import ConfigError

_MAX_SEED = 2**32 - 1


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed Python's, NumPy's and torch's generators; the order of training samples follows this seed too.

    Without `seed` the environment variable RAYLIT_SEED is used, else a random one. Rank 0 of a later run continues from
    the generators as they stand in the driver, the other ranks from states derived from them. `workers` is accepted for
    Lightning's sake: DataLoader workers are seeded by torch from the rank's generator in any case.
    """
    if seed is None:
        seed = int(os.environ.get("RAYLIT_SEED", random.randint(0, _MAX_SEED)))
    if not 0 <= seed <= _MAX_SEED:
        raise ConfigError(f"seed_everything({seed}): must be between 0 and {_MAX_SEED}")
    if verbose:
        print(f"Seed set to {seed}", file=sys.stderr)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    torch.manual_seed(seed)
    return seed
