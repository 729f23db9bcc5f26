"""Training loaders whose batches all have one shape, for devices that compile each new shape. Worker."""

import copy
import warnings
from typing import Any

from torch.utils.data import DataLoader

from raylit.compat.torch_core import drop_iterator
from raylit.core.combined_loader import CombinedLoader, holds_loaders
from raylit.worker.data.sampling import get_length, is_map_style, is_plain_batching


def drop_smaller_batches(loader: Any, *, is_warning: bool) -> Any:
    """Return the loader, or a collection of loaders, without the smaller batch at the end of an epoch.

    A loader with less than one whole batch keeps it: it is the only shape then. Batches of other iterables are what
    they are. With `is_warning` a warning says how many samples of an epoch are left out.
    """
    if isinstance(loader, CombinedLoader):
        members = [drop_smaller_batches(member, is_warning=is_warning) for member in loader.flattened]
        return CombinedLoader(loader.restore_shape(members), loader.mode)
    if isinstance(loader, dict) or holds_loaders(loader):
        return drop_smaller_batches(CombinedLoader(loader), is_warning=is_warning).iterables
    if not isinstance(loader, DataLoader) or loader.batch_size is None or loader.drop_last:
        return loader
    clone = copy.copy(loader)
    drop_iterator(clone)
    # A DataLoader refuses to have these replaced.
    clone.__dict__["drop_last"] = True
    if not is_map_style(loader):
        return clone
    batch_sampler: Any = loader.batch_sampler
    num_samples = get_length(batch_sampler.sampler)
    num_left = num_samples % loader.batch_size
    if not is_plain_batching(batch_sampler) or num_samples < loader.batch_size or num_left == 0:
        return loader
    batching = copy.copy(batch_sampler)
    batching.drop_last = True
    clone.__dict__["batch_sampler"] = batching
    if is_warning:
        warnings.warn(
            f"each training epoch leaves out the {num_left:g} samples of its last, smaller batch, whose shape would be "
            "compiled for them alone: shuffle=True leaves out others each time; drop_last=True says that it is meant",
            stacklevel=2,
        )
    return clone
