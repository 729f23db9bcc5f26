"""seed_everything: one seed for Python, NumPy and torch. Driver and workers."""

import os
import random
import sys

import torch

from raylit.errors import ConfigError

_MAX_SEED = 2**32 - 1
_STREAM_STRIDE = 0x9E3779B97F4A7C15
"""Distance between the seeds of two streams: the golden ratio, so that no small multiple is close to 0."""


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed Python's, NumPy's and torch's generators; the order of training samples follows this seed too.

    Rank 0 of a later run continues from the generators' states in the driver, the other ranks from states derived from
    them: what a hook or a data set draws from torch, NumPy or random differs between the ranks from `on_fit_start` on,
    and is equal before that, where data sets are split.

    Args:
        seed: The seed, from 0 to 2**32 - 1; None: the environment variable RAYLIT_SEED, else a random one.
        workers: Accepted for compatibility with Lightning: torch seeds DataLoader workers from the rank's generator in
            any case.
        verbose: Print the seed to stderr.

    Returns:
        The seed.

    Raises:
        ConfigError: if the seed is out of range.
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
    """Set this process's generators to states that differ by `stream`, derived from their current states."""
    offset = _STREAM_STRIDE * stream
    torch.manual_seed((int(torch.randint(2**63 - 1, ())) + offset) % 2**63)
    random.seed((random.getrandbits(63) + offset) % 2**63)
    if (numpy := sys.modules.get("numpy")) is not None:
        number = int(numpy.random.randint(2**63 - 1, dtype=numpy.int64))
        numpy.random.seed(list(((number + offset) % 2**63).to_bytes(8, "little")))
