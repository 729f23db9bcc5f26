"""The same few batches in every epoch, for overfit_batches. Worker."""

import copy
import warnings
from typing import Any

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from raylit.combined_loader import CombinedLoader, holds_loaders
from raylit.compat.torch_data import drop_iterator
from raylit.worker.data_agreement import Description
from raylit.worker.feed import Feed, TrainSource
from raylit.worker.loaders import is_map_style
from raylit.worker.sampling import is_of_torchdata, is_plain_batching


class SameEpoch:
    """A TrainSource whose epochs are all like the first: samplers that draw an order draw it again."""

    def __init__(self, source: TrainSource) -> None:
        self._source = source
        self.num_batches = source.num_batches
        self.has_exact_length = source.has_exact_length
        self.has_own_state = source.has_own_state

    def epoch(self, epoch: int, *, skip: int = 0) -> Feed:
        return self._source.epoch(0, skip=skip)

    def num_left(self, epoch: int, num_done: int) -> float:
        return self._source.num_left(0, num_done)

    def state_dict(self, *, num_done: int) -> dict[str, Any]:
        return self._source.state_dict(num_done=num_done)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._source.load_state_dict(state)

    @property
    def is_last_batch_short(self) -> bool:
        return self._source.is_last_batch_short

    def descriptions(self) -> list[Description]:
        return self._source.descriptions()

    def order_fingerprint(self) -> int:
        return self._source.order_fingerprint()


def unshuffled(loader: Any) -> Any:
    """The loader, or each one of a collection, in the order of its data set; a warning where it was shuffled.

    Samplers that torch does not know stay: their order is the same in every epoch, which is what matters.
    """
    if isinstance(loader, CombinedLoader):
        return CombinedLoader(loader.shaped([unshuffled(member) for member in loader.flattened]), loader.mode)
    if isinstance(loader, dict) or holds_loaders(loader):
        return unshuffled(CombinedLoader(loader)).iterables
    if not is_map_style(loader):
        return loader
    batch_sampler = loader.batch_sampler
    if batch_sampler is None:
        sampler = _in_order(loader.sampler, loader)
    else:
        sampler = _in_order(batch_sampler.sampler, loader) if is_plain_batching(batch_sampler) else None
    if sampler is None:
        return loader
    warnings.warn(
        "overfit_batches: the training loader shuffles; its batches are now taken in the order of the data set",
        stacklevel=2,
    )
    clone = copy.copy(loader)
    clone.__dict__["sampler"] = sampler
    drop_iterator(clone)
    if batch_sampler is not None:
        batching = copy.copy(batch_sampler)
        batching.sampler = sampler
        clone.__dict__["batch_sampler"] = batching
    return clone


def _in_order(sampler: Any, loader: "DataLoader[Any]") -> Any:
    """What takes the place of a sampler that shuffles; None where it does not, or nobody knows."""
    if isinstance(sampler, DistributedSampler):
        if not sampler.shuffle:
            return None
        split = copy.copy(sampler)
        split.shuffle = False
        return split
    if isinstance(sampler, SubsetRandomSampler):
        return list(sampler.indices)
    if isinstance(sampler, (RandomSampler, WeightedRandomSampler)) or is_of_torchdata(sampler, "RandomSampler"):
        dataset: Any = loader.dataset
        return SequentialSampler(dataset)
    return None
