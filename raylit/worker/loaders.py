"""What a user's loader is made of, and the same loader over other indices. Worker."""

import contextlib
import copy
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from raylit.compat.torch_data import drop_iterator
from raylit.worker.data_agreement import Description, fingerprint_of_samples
from raylit.worker.sampling import Share, length_of


def is_map_style(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def samplers_of(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def parts_of(loader: Any) -> list[Any]:
    return [loader, *samplers_of(loader), getattr(loader, "dataset", None)]


def is_users_own_split(loader: Any) -> bool:
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers_of(loader))


def is_stateful(loader: Any) -> bool:
    """It can say and be told where it stands."""
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def stateful_part(loader: Any) -> Any:
    """What is to be asked for its place: the loader, or a data set that a plain DataLoader reads in this process. None:
    neither knows."""
    if is_stateful(loader):
        return loader
    is_read_here = isinstance(loader, DataLoader) and loader.num_workers == 0
    return loader.dataset if is_read_here and is_stateful(loader.dataset) else None


def may_run_ahead(loader: Any) -> bool:
    """Fetching a batch has no effect in this process: another one has made it."""
    return isinstance(loader, DataLoader) and loader.num_workers > 0 and not is_stateful(loader)


def share_of_sequence(sequence: Sequence[Any], *, rank: int, world_size: int, is_padded: bool = False) -> Share:
    num_batches = len(sequence)
    return Share(
        lambda epoch: iter(range(num_batches)),
        num_items=num_batches,
        is_padded=is_padded,
        rank=rank,
        world_size=world_size,
    )


def copied_loader(loader: "DataLoader[Any]") -> "DataLoader[Any]":
    """One with processes of its own."""
    clone = copy.copy(loader)
    drop_iterator(clone)
    return clone


def with_indices(loader: "DataLoader[Any]", share: Iterable[Any], *, in_order: bool | None) -> "DataLoader[Any]":
    """The same loader with other index batches. Through its `__dict__`, because a DataLoader refuses to have its
    samplers replaced, and making a new one would lose what a subclass added."""
    clone = copied_loader(loader)
    clone.__dict__["sampler" if loader.batch_sampler is None else "batch_sampler"] = share
    if in_order is not None:
        clone.__dict__["in_order"] = in_order
    return clone


def describe(loader: Any, *, share: Share | None) -> Description:
    """What all ranks must have alike of a loader, whose own sampler splits it (`share` is None) or raylit."""
    is_read_by_index = is_map_style(loader) or isinstance(loader, Sequence)
    description: Description = {"way to read it": "by index" if is_read_by_index else "from start to end"}
    if share is not None:
        name = "number of samples" if share.batch_size is not None else "number of batches"
        description[name] = share.num_items
        description["batch size"] = share.batch_size
        description["drop_last"] = share.drop_last
    if is_read_by_index:
        dataset: Any = loader.dataset if isinstance(loader, DataLoader) else loader
        description["length of the data set"] = length_of(dataset)
        description["samples"] = fingerprint_of_samples(dataset)
    return description


def iterated(loader: Iterable[Any], share: Share | None) -> Iterator[Any]:
    """The loader's batches of this share; a DataLoader has it as its batch sampler."""
    if share is not None and isinstance(loader, Sequence):
        return map(loader.__getitem__, share)
    return begin_iteration(loader)


def begin_iteration(loader: Iterable[Any]) -> Iterator[Any]:
    """Iterate over a loader; remember its processes for `explain_dead_process`.

    Where this process finishes its step after a SIGTERM or Ctrl-C, a DataLoader's processes get process groups of their
    own: a signal to the whole group would end them during that step.
    """
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        return iter(loader)
    attributes: dict[str, Any] = loader.__dict__
    before = attributes["worker_init_fn"]
    if _is_deferring_signals():
        attributes["worker_init_fn"] = _OwnGroup(before)
    try:
        return iter(loader)
    finally:
        attributes["worker_init_fn"] = before
        _children.update(multiprocessing.active_children())


def explain_dead_process(error: BaseException) -> None:
    """Say in torch's error about a DataLoader's process how that has ended, and remove what it has left on the disk."""
    if isinstance(error, (ConnectionError, EOFError)):  # it died while a batch of its was on the way
        pids = _wait_for_dead_children()
    else:
        found = _DEAD_PROCESS.search(str(error)) if isinstance(error, RuntimeError) else None
        pids = [] if found is None else [int(pid) for pid in found[1].split(",")]
    if not pids:
        return
    codes = {child.pid: child.exitcode for child in _children}
    ends = [f"process {pid} {_describe_exit(codes[pid])}" for pid in pids if codes.get(pid) is not None]
    advice = (
        "The kernel kills by SIGKILL where memory is short, and a full /dev/shm shows as SIGBUS: use fewer processes "
        "(num_workers of the DataLoader) or smaller batches, or give the container more shared memory; num_workers=0 "
        "shows what crashes in the data set"
    )
    how = ", ".join(ends) or "how it ended is not known"
    error.args = (f"{str(error).strip().rstrip('.')} ({how}). {advice}",)
    for pid in pids:
        _remove_sockets(pid)


_children: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()
"""The processes of this process's DataLoaders, which torch's errors name by their ids only."""
_DEAD_PROCESS = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")


def _wait_for_dead_children() -> list[int]:
    """The kernel may take a moment to tell how a process has ended."""
    deadline = time.monotonic() + _EXIT_S
    while True:
        dead = [child.pid for child in _children if child.pid is not None and child.exitcode]
        if dead or not _children or time.monotonic() > deadline:
            return dead
        time.sleep(0.02)


_EXIT_S = 0.5


def _describe_exit(code: int | None) -> str:
    assert code is not None
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _remove_sockets(pid: int) -> None:
    """A killed process leaves the directory of the sockets by which it has sent tensors; they have its id in their
    names."""
    for directory in Path(tempfile.gettempdir()).glob("pymp-*"):
        with contextlib.suppress(OSError):
            names = os.listdir(directory)
            if names and all(name.startswith(f"listener-{pid}-") for name in names):
                shutil.rmtree(directory, ignore_errors=True)


class _OwnGroup:
    """A DataLoader's `worker_init_fn`: a process group for the process alone, then the user's."""

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self._init = init

    def __call__(self, process: int) -> None:
        os.setpgid(0, 0)
        if self._init is not None:
            self._init(process)


def _is_deferring_signals() -> bool:
    """The driver's handlers are in place, which are raylit's: the run's only worker is in this process."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return hasattr(os, "setpgid") and any(
        str(getattr(handler, "__module__", "")).startswith("raylit.") for handler in handlers
    )
