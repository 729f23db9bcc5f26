"""Checks that all ranks have the same data, before shares of different data sets repeat some samples and omit others.

Each rank builds its data set in its own process. No sample is fetched for the checks: a data set is compared by its
length and by what identifies its samples without fetching them (the indices of a Subset, tensors, lists of file names
and labels), an order by its indices, a stream by its first batches, which every rank reads anyway.
"""

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import PurePath
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from raylit.errors import ModuleError
from raylit.worker.collectives import Collectives

Description = dict[str, Any]
"""Properties of a loader that must be equal on all ranks: plain values and Fingerprints, by their names in errors."""

_MAX_ROWS = 1024
"""Entries of a collection that are compared, evenly spaced."""
_MAX_MAPPED_ROWS = 16
"""Entries of a memory-mapped array that are compared; each may cost a seek on a network disk."""
_MAX_ELEMENTS = 1024
"""Elements that are compared of a tensor or array that is one entry."""
_MAX_FLOATS = 1024
_MAX_DEPTH = 4
_MAX_COLUMNS = 16
_RELATIVE_TOLERANCE = 1e-3
"""Tolerance for values computed in `setup`, which processors of different hosts may round differently."""
_ABSOLUTE_TOLERANCE = 1e-6


class Fingerprint:
    """Fingerprint of data: a hash of integers, strings and shapes, and a sample of its floating-point numbers.

    The floating-point numbers are compared with a tolerance.
    """

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=6)
        self.floats: list[float] = []

    @property
    def exact(self) -> int:
        """Hash of 48 bits, which a float64 holds exactly."""
        return int.from_bytes(self._hash.digest(), "little")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Fingerprint)
            and self.exact == other.exact
            and len(self.floats) == len(other.floats)
            and all(map(_is_close, self.floats, other.floats))
        )

    def __hash__(self) -> int:
        return self.exact

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _ReceivedFingerprint, (self.exact, self.floats)

    def add_value(self, value: Any, *, depth: int = 0) -> None:
        """Add a sample, a batch, or a part of one."""
        if isinstance(value, (float, numpy.floating)):
            self._add_floats([float(value)])
        elif value is None or isinstance(value, (bool, int, complex, bytes)):
            self._add(repr(value))
        elif isinstance(value, str):
            # Only the file's name: its directory may differ between hosts.
            self._add(value.rsplit("/", 1)[-1] if value.startswith("/") else value)
        elif isinstance(value, PurePath):
            self._add(value.name)
        elif isinstance(value, numpy.generic):
            self.add_value(value.item(), depth=depth)
        elif isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, numpy.ndarray):
            self._add_array(value)
        elif depth < _MAX_DEPTH:
            self._add_collection(value, depth)
        else:
            self._add(type(value).__qualname__)

    def add_rows(self, rows: Any) -> None:
        """Add a collection with one entry per sample."""
        num_rows = len(rows)
        self._add(f"{num_rows} rows")
        is_mapped = isinstance(rows, numpy.memmap)
        step = max(1, math.ceil(num_rows / (_MAX_MAPPED_ROWS if is_mapped else _MAX_ROWS)))
        if isinstance(rows, (Tensor, numpy.ndarray)):
            num_elements = max(1, _MAX_ROWS * step // max(1, num_rows))
            sampled = rows[::step]
            self.add_value(sampled.reshape(len(sampled), -1)[:, :num_elements] if num_rows else sampled)
        elif isinstance(rows, Mapping):
            for key, row in islice(rows.items(), _MAX_ROWS):
                self.add_value(key, depth=1)
                self.add_value(row, depth=1)
        else:
            for row in rows[::step]:
                self.add_value(row, depth=1)

    def _add(self, text: str) -> None:
        self._hash.update(text.encode(errors="replace") + b"\0")

    def _add_floats(self, values: Iterable[float]) -> None:
        self.floats += islice(values, _MAX_FLOATS - len(self.floats))

    def _add_tensor(self, tensor: Tensor) -> None:
        self._add(f"{tuple(tensor.shape)} {tensor.dtype}")
        is_plain = tensor.layout is torch.strided and not tensor.is_quantized
        if not is_plain or tensor.device.type != "cpu":  # reading from a device would wait for it
            return
        sampled = tensor.detach().reshape(-1)
        sampled = sampled[:: max(1, sampled.numel() // _MAX_ELEMENTS)]
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            sampled = torch.view_as_real(sampled.to(torch.complex128)).reshape(-1) if tensor.is_complex() else sampled
            self._add_floats(sampled.to(torch.float64).tolist())
        else:
            self._hash.update(sampled.to(torch.int64).numpy().tobytes())

    def _add_array(self, array_: Any) -> None:
        self._add(f"{array_.shape} {array_.dtype}")
        sampled = array_.reshape(-1)
        sampled = sampled[:: max(1, sampled.size // _MAX_ELEMENTS)]
        if array_.dtype.kind == "f":
            self._add_floats(sampled.astype(numpy.float64).tolist())
        elif array_.dtype.kind in "biu":
            self._hash.update(sampled.astype(numpy.int64).tobytes())
        elif array_.dtype.kind in "USO":
            for item in sampled.tolist():
                self.add_value(item, depth=1)

    def _add_collection(self, value: Any, depth: int) -> None:
        items: Iterable[Any]
        if isinstance(value, Mapping):
            items = [part for pair in islice(value.items(), _MAX_ROWS) for part in pair]
        elif isinstance(value, (list, tuple, range)):
            items = value[:: max(1, math.ceil(len(value) / _MAX_ROWS))]
        elif is_dataclass(value) and not isinstance(value, type):
            items = [getattr(value, field.name) for field in fields(value)]
        else:
            self._add(type(value).__qualname__)
            return
        self._add(f"{type(value).__name__} of {len(value) if hasattr(value, '__len__') else ''}")
        for item in items:
            self.add_value(item, depth=depth + 1)


class _ReceivedFingerprint(Fingerprint):
    """Fingerprint that was computed on another rank."""

    def __init__(self, exact: int, floats: list[float]) -> None:
        super().__init__()
        self._exact = exact
        self.floats = floats

    @property
    def exact(self) -> int:
        return self._exact


def _is_close(one: float, other: float) -> bool:
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return math.isclose(one, other, rel_tol=_RELATIVE_TOLERANCE, abs_tol=_ABSOLUTE_TOLERANCE)


def fingerprint_samples(dataset: Any) -> Fingerprint:
    """Fingerprint a map-style data set as far as is possible without fetching a sample."""
    fingerprint = Fingerprint()
    _add_dataset(fingerprint, dataset, depth=0)
    return fingerprint


def fingerprint_indices(indices: Sequence[Any]) -> int:
    """Hash the indices that a sampler has yielded to 48 bits; 65,536 integers take 2 ms."""
    try:
        data = array("q", indices).tobytes()
    except (TypeError, OverflowError):  # names, pairs, batches of indices
        fingerprint = Fingerprint()
        fingerprint.add_value(list(indices))
        return fingerprint.exact
    return int.from_bytes(blake2b(data, digest_size=6).digest(), "little")


def check_ranks_agree(collectives: Collectives, describe: Mapping[str, Callable[[], Sequence[Description]]]) -> None:
    """Compare the loaders of all ranks. Collective.

    Args:
        collectives: The ranks to compare.
        describe: Functions that describe the loaders, by the data's name in errors ("training").

    Raises:
        ModuleError: The descriptions differ; raised on every rank.
    """
    if collectives.world_size == 1:
        return
    # Where PYTHONHASHSEED differs, strings have different hashes and sets different orders.
    descriptions = {name: describe_loaders() for name, describe_loaders in describe.items()}
    answers_of_ranks = collectives.gather_objects((hash("PYTHONHASHSEED"), descriptions))
    for name in descriptions:
        loaders = [on_rank.get(name, ()) for _, on_rank in answers_of_ranks]
        difference = _describe_difference("loaders", [len(on_rank) for on_rank in loaders])
        for index, ranked_descriptions in enumerate(zip(*loaders, strict=False)):
            which_loader = f" (loader {index})" if len(loaders[0]) > 1 else ""
            for property_name in ranked_descriptions[0]:
                difference = difference or _describe_difference(
                    property_name + which_loader, [one.get(property_name) for one in ranked_descriptions]
                )
        if difference is not None:
            raise ModuleError(
                f"the ranks do not agree about the {name} data: {difference}. Each worker runs setup() and the loader "
                "hooks in a process of its own, and all must make the same data set in the same order: sort what comes "
                "out of a set or a directory listing, give random splits and generators of your own a fixed seed "
                "(default_rng(0)). Data that is meant to differ between the ranks needs use_distributed_sampler=False"
                + _describe_hash_seeds({hash_of_string for hash_of_string, _ in answers_of_ranks})
            )


def check_epoch(collectives: Collectives, *, name: str, order: int, num_batches: float = 0.0) -> None:
    """Compare the order in which the ranks are about to take their samples and their numbers of batches.

    Collective, once per epoch.

    Args:
        collectives: The ranks to compare.
        name: The data's name in errors.
        order: Fingerprint of the order; see `fingerprint_indices`.
        num_batches: Batches that this rank will have.

    Raises:
        ModuleError: They differ; raised on every rank.
    """
    if collectives.world_size == 1:
        return
    rows = collectives.gather_vector(torch.tensor([float(order), num_batches], dtype=torch.float64))
    if bool((rows == rows[0]).all()):
        return
    difference = _describe_difference("number of batches in the epoch", [float(count) for count in rows[:, 1]])
    if difference is None:
        ranks = ", ".join(str(rank) for rank in range(collectives.world_size) if rows[rank, 0] != rows[0, 0])
        difference = f"the sampler's order on rank {ranks} is not that of rank 0"
    raise ModuleError(
        f"the ranks do not agree about the {name} data: {difference}. Each worker has a sampler of its own, and all "
        "must draw the same order: give a generator of the sampler's own a fixed seed, draw from the global generators "
        "of torch, NumPy and random (which raylit sets alike on all ranks while a sampler draws), or split the data in "
        "the sampler and pass use_distributed_sampler=False"
    )


def check_first_batches(collectives: Collectives, batches: Sequence[Any], *, name: str) -> None:
    """Compare the first batches of a stream that each rank reads from its start and keeps its part of.

    Collective, at a stream's start.

    Raises:
        ModuleError: They differ; raised on every rank.
    """
    fingerprint = Fingerprint()
    fingerprint.add_value(list(batches))
    answers = collectives.gather_objects(fingerprint)
    different = [rank for rank, answer in enumerate(answers) if answer != answers[0]]
    if not different:
        return
    ranks = ", ".join(map(str, different))
    raise ModuleError(
        f"the {name} data is a stream that begins with other batches on rank {ranks} than on rank 0, so it cannot be "
        "shared out: raylit has every rank read the whole stream and keep every world_size-th batch. If the stream "
        "splits itself by rank (get_rank(), RANK, split_by_node, split_dataset_by_node), pass "
        "use_distributed_sampler=False: each rank then takes all of its own. Else make it alike on all ranks: give "
        "generators of its own a fixed seed, and sort what comes out of a set or a directory listing"
    )


def _describe_difference(what: str, values: Sequence[Any]) -> str | None:
    """Describe how the ranks' values differ; None where all ranks have the same."""
    different = [rank for rank, value in enumerate(values) if value != values[0]]
    if not different:
        return None
    if isinstance(values[0], Fingerprint):
        return f"the {what} on rank {', '.join(map(str, different))} are not those of rank 0"
    listed = ", ".join(f"{_format_value(values[rank])} on rank {rank}" for rank in (0, *different))
    return f"the {what} is {listed}"


def _format_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _describe_hash_seeds(hashes: set[int]) -> str:
    if len(hashes) == 1:
        return ""
    return (
        ". The workers have different hash seeds, so that a set of strings has another order in each: start the nodes "
        "of the Ray cluster with the environment variable PYTHONHASHSEED=0"
    )


def _add_dataset(fingerprint: Fingerprint, dataset: Any, *, depth: int) -> None:
    if depth > _MAX_DEPTH:
        return
    if isinstance(dataset, (list, tuple, range, Tensor, numpy.ndarray)):
        fingerprint.add_rows(dataset)
    elif isinstance(dataset, Subset):
        if _is_table(dataset.indices, len(dataset.indices)):
            fingerprint.add_rows(dataset.indices)
        _add_dataset(fingerprint, dataset.dataset, depth=depth + 1)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets[:_MAX_COLUMNS]:
            _add_dataset(fingerprint, part, depth=depth + 1)
    elif isinstance(dataset, TensorDataset):
        for tensor in dataset.tensors:
            fingerprint.add_rows(tensor)
    else:
        _add_attributes(fingerprint, dataset, depth)


def _add_attributes(fingerprint: Fingerprint, dataset: Any, depth: int) -> None:
    """Add the attributes with one entry per sample, and data sets inside the data set.

    Other attributes may legitimately differ between ranks: a cache, a directory, a connection.
    """
    try:
        num_samples = len(dataset)
    except (TypeError, NotImplementedError):
        return
    for name, value in sorted(getattr(dataset, "__dict__", {}).items()):
        columns = [value]
        if isinstance(value, (list, tuple)) and len(value) <= _MAX_COLUMNS and len(value) != num_samples:
            columns = list(value)
        elif isinstance(value, dict) and len(value) <= _MAX_COLUMNS and len(value) != num_samples:
            columns = list(value.values())
        for column in columns:
            if isinstance(column, Dataset):
                _add_dataset(fingerprint, column, depth=depth + 1)
            elif _is_table(column, num_samples):
                fingerprint.add_value(name)
                fingerprint.add_rows(column)


def _is_table(value: Any, num_rows: int) -> bool:
    if not isinstance(value, (list, tuple, range, dict, Tensor, numpy.ndarray)):
        return False
    if isinstance(value, (Tensor, numpy.ndarray)) and value.ndim == 0:
        return False
    return len(value) == num_rows > 0
