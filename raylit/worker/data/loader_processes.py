"""The processes of a DataLoader: their start, their deaths, and their random states, which a resumed run continues.

Runs in the worker and in the processes of its DataLoader.
"""

import contextlib
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from raylit.checkpoint import format
from raylit.compat.torch_core import drop_iterator
from raylit.seed import diverge_random_state

_OTHERS_BYTES = 12 * 1024
"""Space for the states of Python's and NumPy's generators, which usually take 7 KB."""
_SIZE_BYTES = 4
_START_TIMEOUT_S = 60.0
_NUM_SPARE_SLOTS = 4
"""Slots beyond the prefetched batches: those that the step and the copy to the device hold, and one in work."""


class ProcessRandom:
    """Random states of the DataLoader's processes after each batch, in memory shared with this process.

    Recording costs a process 0.05 ms per batch and the training loop nothing. Batch i of an iteration is made by
    process i modulo the number of processes.
    """

    def __init__(self, loader: "DataLoader[Any]") -> None:
        self._num_processes = loader.num_workers
        self._num_slots = (loader.prefetch_factor or 2) + _NUM_SPARE_SLOTS
        self._is_persistent = loader.persistent_workers
        self._collate = loader.collate_fn
        self._init: Callable[[int], None] | None = loader.worker_init_fn
        self._slots: Tensor | None = None
        self._num_recorded = torch.zeros(0)
        self._first_process = 0
        """Process whose part in the batches the first process has taken over."""
        self._nums_made_before: list[int] = []
        """Batches that each process had made before this iteration."""
        self._state_to_restore: dict[str, Any] | None = None

    def is_restart_due(self) -> bool:
        """Return whether persistent processes must restart.

        They must where each of them made another one's batches in a continued epoch.
        """
        return self._slots is not None and self._first_process != 0 and self._is_persistent

    def begin(self, loader: "DataLoader[Any]", *, num_drawn: int, is_going_on: bool) -> None:
        """Prepare an iteration of `loader`.

        Args:
            loader: The DataLoader that is about to be iterated.
            num_drawn: Batches that the last iteration has drawn.
            is_going_on: The iteration begins at the position of the loaded state.
        """
        if self._slots is not None and self._is_persistent:
            if not self.is_restart_due():
                self._nums_made_before = self._count_batches_made(num_drawn)
                return
            drop_iterator(loader)
            self.load_state_dict(self.state_dict(num_given=num_drawn))
        states = self._start_states(is_going_on)
        torch_bytes = torch.get_rng_state().numel()
        num_bytes = torch_bytes + _SIZE_BYTES + _OTHERS_BYTES
        self._slots = torch.zeros(self._num_processes, self._num_slots, num_bytes, dtype=torch.uint8).share_memory_()
        self._num_recorded = torch.zeros(self._num_processes, dtype=torch.int64).share_memory_()
        self._nums_made_before = [0] * self._num_processes
        recorder = _StateRecorder(self._collate, self._slots, self._num_recorded)
        loader.__dict__["collate_fn"] = recorder
        loader.__dict__["worker_init_fn"] = _WorkerInit(self._init, recorder, states)

    def state_dict(self, *, num_given: int) -> dict[str, Any] | None:
        """Return the state after this iteration's first `num_given` batches; None before the first iteration.

        Waits for processes that have not begun.
        """
        if self._slots is None:
            return self._state_to_restore
        states = [
            self._wait_for_state(process, number) for process, number in enumerate(self._count_batches_made(num_given))
        ]
        states_by_process = [
            states[(process - self._first_process) % self._num_processes] for process in range(self._num_processes)
        ]
        return {"states": states_by_process, "next": (self._first_process + num_given) % self._num_processes}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Load a state for the next iteration; that of another number of processes is ignored."""
        if state is not None and len(state["states"]) == self._num_processes:
            self._state_to_restore = state

    def _start_states(self, is_going_on: bool) -> list[dict[str, Any] | None]:
        state, self._state_to_restore, self._first_process = self._state_to_restore, None, 0
        if state is None or not (is_going_on or self._is_persistent):
            return [None] * self._num_processes
        states: list[dict[str, Any] | None] = state["states"]
        if is_going_on:
            # A DataLoader's first process always makes the next batch, whichever process's turn it was.
            self._first_process = state["next"]
        return [*states[self._first_process :], *states[: self._first_process]]

    def _count_batches_made(self, num_batches: int) -> list[int]:
        """Count the batches that each process has made after `num_batches` of this iteration."""
        return [
            num_made_before + len(range(process, num_batches, self._num_processes))
            for process, num_made_before in enumerate(self._nums_made_before)
        ]

    def _wait_for_state(self, process: int, number: int) -> dict[str, Any] | None:
        """Read the state after batch `number` of a process; None if it does not come in time or did not fit."""
        assert self._slots is not None
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self._num_recorded[process] <= number:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.005)
        slot = self._slots[process, number % self._num_slots]
        torch_state, size, others = slot.split([slot.numel() - _SIZE_BYTES - _OTHERS_BYTES, _SIZE_BYTES, _OTHERS_BYTES])
        num_bytes = int.from_bytes(size.tolist(), "little")
        if num_bytes == 0:
            return None
        python, numpy = pickle.loads(bytes(others[:num_bytes].tolist()))
        state: dict[str, Any] = {"torch": torch_state.clone(), "python": python}
        return state if numpy is None else {**state, "numpy": format.to_plain_values(numpy, "numpy.random")}


class RankSeeding:
    """`worker_init_fn` of a DataLoader with its own `generator`, which is equal on all ranks.

    torch seeds the processes from that generator; those of ranks other than 0 must draw different numbers.
    """

    def __init__(self, init: Callable[[int], None] | None, *, rank: int) -> None:
        self._init = init
        self._rank = rank

    def __call__(self, process: int) -> None:
        diverge_random_state(self._rank)
        if self._init is not None:
            self._init(process)


class _StateRecorder:
    """`collate_fn` of a DataLoader that records the random state after each batch, with which the next one begins."""

    def __init__(self, collate: Callable[[Any], Any], slots: Tensor, num_recorded: Tensor) -> None:
        self._collate = collate
        self._slots = slots
        self._num_recorded = num_recorded

    def __call__(self, samples: Any) -> Any:
        batch = self._collate(samples)
        self.record()
        return batch

    def record(self) -> None:
        info = get_worker_info()
        if info is None:
            return
        numpy = sys.modules.get("numpy")
        others = pickle.dumps((random.getstate(), None if numpy is None else numpy.random.get_state(legacy=False)))
        num_bytes = len(others) if len(others) <= _OTHERS_BYTES else 0
        number = int(self._num_recorded[info.id])
        slot = self._slots[info.id, number % self._slots.shape[1]]
        slot[: -_SIZE_BYTES - _OTHERS_BYTES] = torch.get_rng_state()
        packed = num_bytes.to_bytes(_SIZE_BYTES, "little") + others[:num_bytes]
        slot[-_SIZE_BYTES - _OTHERS_BYTES :][: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        # Written last: it publishes the slot.
        self._num_recorded[info.id] = number + 1


class _WorkerInit:
    """`worker_init_fn` of a DataLoader: calls the user's, then sets the random state that the process starts with."""

    def __init__(
        self, init: Callable[[int], None] | None, recorder: _StateRecorder, states: list[dict[str, Any] | None]
    ) -> None:
        self._init = init
        self._recorder = recorder
        self._states = states

    def __call__(self, process: int) -> None:
        if self._init is not None:
            self._init(process)
        state = self._states[process]
        if state is not None:
            format.set_random_state(state)
        self._recorder.record()


def begin_iteration(loader: Iterable[Any]) -> Iterator[Any]:
    """Iterate over a loader and remember its processes for `explain_dead_process`.

    Where this process finishes its step after SIGTERM or Ctrl-C, a DataLoader's processes get their own process groups:
    a signal to the whole group would end them during that step.
    """
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        return iter(loader)
    attributes: dict[str, Any] = loader.__dict__
    user_init = attributes["worker_init_fn"]
    if _is_deferring_signals():
        attributes["worker_init_fn"] = _ProcessGroupInit(user_init)
    try:
        return iter(loader)
    finally:
        attributes["worker_init_fn"] = user_init
        _children.update(multiprocessing.active_children())


def explain_dead_process(error: BaseException) -> None:
    """Add to torch's error how a DataLoader's process ended, and remove the sockets that it left on the disk.

    An error that has been explained already stays as it is.
    """
    if _ADVICE in str(error):
        return
    if isinstance(error, (ConnectionError, EOFError)):  # it died while it was sending a batch
        pids = _wait_for_dead_children()
    else:
        match = _DEAD_PROCESS.search(str(error)) if isinstance(error, RuntimeError) else None
        pids = [] if match is None else [int(pid) for pid in match[1].split(",")]
    if not pids:
        return
    codes = {child.pid: child.exitcode for child in _children}
    ends = [f"process {pid} {_describe_exit(codes[pid])}" for pid in pids if codes.get(pid) is not None]
    how = ", ".join(ends) or "how it ended is not known"
    error.args = (f"{str(error).strip().rstrip('.')} ({how}). {_ADVICE}",)
    for pid in pids:
        _remove_sockets(pid)


_ADVICE = (
    "The kernel kills by SIGKILL where memory is short, and a full /dev/shm shows as SIGBUS: use fewer processes "
    "(num_workers of the DataLoader) or smaller batches, or give the container more shared memory; num_workers=0 shows "
    "what crashes in the data set"
)
_children: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()
"""Processes of this process's DataLoaders; torch's errors name them by their ids only."""
_DEAD_PROCESS = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")


def _wait_for_dead_children() -> list[int]:
    """Return the ids of dead DataLoader processes; the kernel may report an exit code with a delay."""
    deadline = time.monotonic() + _EXIT_S
    while True:
        dead = [child.pid for child in _children if child.pid is not None and child.exitcode]
        if dead or not _children or time.monotonic() > deadline:
            return dead
        time.sleep(0.02)


_EXIT_S = 2.0
"""Time for a dead process to be seen as such, also on a busy machine."""


def _describe_exit(code: int | None) -> str:
    assert code is not None
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _remove_sockets(pid: int) -> None:
    """Remove the directory of sockets by which a killed process sent tensors; their names contain its id."""
    for directory in Path(tempfile.gettempdir()).glob("pymp-*"):
        with contextlib.suppress(OSError):
            names = os.listdir(directory)
            if names and all(name.startswith(f"listener-{pid}-") for name in names):
                shutil.rmtree(directory, ignore_errors=True)


class _ProcessGroupInit:
    """`worker_init_fn` of a DataLoader: puts the process into its own process group, then calls the user's."""

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self._init = init

    def __call__(self, process: int) -> None:
        os.setpgid(0, 0)
        if self._init is not None:
            self._init(process)


def _is_deferring_signals() -> bool:
    """Return whether raylit's signal handlers are installed here.

    They are where the run's only worker is in the driver's process.
    """
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return hasattr(os, "setpgid") and any(
        str(getattr(handler, "__module__", "")).startswith("raylit.") for handler in handlers
    )
