"""seed_everything: one seed for Python, NumPy and torch. Both sides."""

import os
import random
import sys

import torch

from raylit.errors import ConfigError

_MAX_SEED = 2**32 - 1
_STREAM_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of two streams of random numbers: the golden ratio, so that no small multiple comes close to 0."""


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed Python's, NumPy's and torch's generators; the order of training samples follows this seed too.

    Without `seed` the environment variable RAYLIT_SEED is used, else a random one. Rank 0 of a later run continues from
    the generators as they stand in the driver, the other ranks from states derived from them: what a hook or a data set
    draws from torch, NumPy or random differs between the ranks from `on_fit_start` on, and is alike in what comes
    before, where data sets are split. `workers` is accepted for Lightning's sake: DataLoader workers are seeded by
    torch from the rank's generator in any case.
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


def diverge_random_state(stream: int) -> None:
    """Set this process's generators to states of their own for each `stream`, derived from those that they are in."""
    offset = _STREAM_STRIDE * stream
    torch.manual_seed((int(torch.randint(2**63 - 1, ())) + offset) % 2**63)
    random.seed((random.getrandbits(63) + offset) % 2**63)
    if (numpy := sys.modules.get("numpy")) is not None:
        drawn = int(numpy.random.randint(2**63 - 1, dtype=numpy.int64))
        numpy.random.seed(list(((drawn + offset) % 2**63).to_bytes(8, "little")))
