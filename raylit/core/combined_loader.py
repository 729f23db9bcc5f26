"""CombinedLoader: several loaders as one, with a batch of each per step. A user's object. Driver and workers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor
from torch.utils.data import DataLoader

from raylit.accelerators.transfer import is_namedtuple
from raylit.config import CombinationName
from raylit.errors import ConfigError

_END = object()


class CombinedLoader:
    """Collection of loaders (list, tuple, dict, nested) whose batches have the collection's shape.

    In `fit`, each loader is divided among the workers as if it were alone, except that no worker is ever without a
    batch: if a loader's last batches are fewer than the workers, samples from its start fill them up. "sequential"
    leaves them uneven, as for a single loader. Iterated directly it yields (batch, batch_idx, dataloader_idx).

    Args:
        iterables: The loaders.
        mode: "min_size" ends with the shortest loader; "max_size_cycle" restarts shorter ones until the longest ends;
            "max_size" has None in place of their batches; "sequential" gives one loader after the other, with a plain
            batch each.

    Raises:
        ConfigError: if the mode is unknown.
    """

    def __init__(self, iterables: Any, mode: CombinationName = "min_size") -> None:
        if mode not in get_args(CombinationName):
            raise ConfigError(f"mode={mode!r}: must be one of {', '.join(map(repr, get_args(CombinationName)))}")
        self.iterables = iterables
        self.mode = mode

    @property
    def flattened(self) -> list[Any]:
        """The loaders, in the order of the collection. Lightning's name."""
        return list(_iterate_loaders(self.iterables, is_top=True))

    def restore_shape(self, values: Sequence[Any]) -> Any:
        """Return the values, one for each loader, in the collection's shape."""
        return _restore_shape(self.iterables, iter(values), is_top=True)

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        if self.mode == "sequential":
            for index, loader in enumerate(self.flattened):
                for batch_idx, batch in enumerate(loader):
                    yield batch, batch_idx, index
            return
        openers = [lambda number, loader=loader: iter(loader) for loader in self.flattened]
        for batch_idx, batches in enumerate(stepwise(openers, mode=self.mode)):
            yield self.restore_shape(batches), batch_idx, 0

    def __len__(self) -> int:
        """Return the number of steps.

        Raises:
            TypeError: if a loader has no length.
        """
        return int(num_steps([len(loader) for loader in self.flattened], mode=self.mode))


def holds_loaders(value: Any) -> bool:
    """Return whether a list, tuple or dict is a collection of loaders, not of batches and not one batch."""
    members = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(_is_loader(member) or holds_loaders(member) for member in members)


def num_steps(lengths: Sequence[float], *, mode: CombinationName) -> float:
    """Return the number of batches of a combination, from its loaders' lengths.

    An unknown length is infinite, which counts as not less than any known one.
    """
    if not lengths:
        return 0
    if mode == "sequential":
        return sum(lengths)
    if mode == "min_size" or (mode == "max_size_cycle" and min(lengths) == 0):
        return min(lengths)
    return max(lengths)


def stepwise(
    openers: Sequence[Callable[[int], Iterator[Any]]], *, mode: CombinationName, passes: Sequence[int] = ()
) -> Iterator[list[Any]]:
    """Yield for each step the batches of all loaders.

    Args:
        openers: For each loader a function that gets the number of its pass through the data, from 0, and returns the
            batches of that pass.
        mode: As in CombinedLoader.
        passes: Numbers of the passes to begin with; empty: all 0.
    """
    numbers = list(passes) or [0] * len(openers)
    iterators = [opener(number) for opener, number in zip(openers, numbers, strict=True)]
    # Not a generator itself, so that the loaders start when this is called, not at the first batch.
    return _zip_batches(openers, iterators, numbers, mode)


def _zip_batches(
    openers: Sequence[Callable[[int], Iterator[Any]]],
    iterators: list[Iterator[Any]],
    numbers: list[int],
    mode: CombinationName,
) -> Iterator[list[Any]]:
    is_over = [number > 0 for number in numbers]
    while iterators:
        batches: list[Any] = []
        for index, opener in enumerate(openers):
            is_waiting = mode == "max_size" and is_over[index]
            batch = _END if is_waiting else next(iterators[index], _END)
            if batch is _END:
                is_over[index] = True
                if mode == "min_size" or all(is_over):
                    return
                batch = None
                if mode == "max_size_cycle":
                    numbers[index] += 1
                    iterators[index] = opener(numbers[index])
                    batch = next(iterators[index], _END)
                    if batch is _END:  # an empty loader
                        return
            batches.append(batch)
        yield batches


def _is_loader(value: Any) -> bool:
    if isinstance(value, (DataLoader, CombinedLoader)):
        return True
    is_batch_like = (
        isinstance(value, (Tensor, Mapping, Sequence)) or hasattr(value, "to") or hasattr(value, "__array__")
    )
    return hasattr(type(value), "__iter__") and not is_batch_like


def _is_nested(value: Any, is_top: bool) -> bool:
    """Return whether the value is a collection; lists of batches are loaders and not taken apart."""
    return (is_top and isinstance(value, (list, tuple, dict))) or holds_loaders(value)


def _iterate_loaders(value: Any, *, is_top: bool = False) -> Iterator[Any]:
    if not _is_nested(value, is_top):
        yield value
        return
    for member in value.values() if isinstance(value, dict) else value:
        yield from _iterate_loaders(member)


def _restore_shape(collection: Any, values: Iterator[Any], *, is_top: bool = False) -> Any:
    if not _is_nested(collection, is_top):
        return next(values)
    if isinstance(collection, dict):
        return {key: _restore_shape(member, values) for key, member in collection.items()}
    members = [_restore_shape(member, values) for member in collection]
    if is_namedtuple(collection):
        return type(collection)(*members)
    return tuple(members) if isinstance(collection, tuple) else members
