"""ProcessRandom: how far a DataLoader's own processes have got in their random numbers, for a resumed run to go on with
the same augmentation. Worker, and the processes of its DataLoader."""

import pickle
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from raylit.checkpoint import format
from raylit.compat.torch_data import drop_iterator
from raylit.seed import diverge_random_state

_OTHERS_BYTES = 12 * 1024
"""Room for the states of Python's and NumPy's generators, which take 7 KB as a rule."""
_SIZE_BYTES = 4
_START_TIMEOUT_S = 60.0
_NUM_SPARE_SLOTS = 4
"""Beyond the batches that a process is ahead: those that the step and the copy to the device hold, and one in work."""


class ProcessRandom:
    """Each process notes its random state after every batch, in memory that it shares with this one: 0.05 ms of its own
    time, nothing of the training's. Batch i of an iteration is made by process i modulo their number."""

    def __init__(self, loader: "DataLoader[Any]") -> None:
        self._num_processes = loader.num_workers
        self._num_slots = (loader.prefetch_factor or 2) + _NUM_SPARE_SLOTS
        self._is_persistent = loader.persistent_workers
        self._collate = loader.collate_fn
        self._init: Callable[[int], None] | None = loader.worker_init_fn
        self._slots: Tensor | None = None
        self._num_noted = torch.zeros(0)
        self._first = 0
        """Whose part in the batches the first process has taken over."""
        self._num_before: list[int] = []
        """Batches that each process had made before this iteration."""
        self._resumed: dict[str, Any] | None = None

    def is_restart_due(self) -> bool:
        """Persistent processes took over each other's part in the epoch that went on: each is to have its own again."""
        return self._slots is not None and self._first != 0 and self._is_persistent

    def begin(self, loader: "DataLoader[Any]", *, num_drawn: int, is_going_on: bool) -> None:
        """Before an iteration of `loader`, whose last one has asked for `num_drawn` batches. `is_going_on`: it begins
        where the state that was loaded stood."""
        if self._slots is not None and self._is_persistent:
            if not self.is_restart_due():
                self._num_before = self._num_made(num_drawn)
                return
            drop_iterator(loader)
            self.load_state_dict(self.state_dict(num_given=num_drawn))
        states = self._first_states(is_going_on)
        torch_bytes = torch.get_rng_state().numel()
        num_bytes = torch_bytes + _SIZE_BYTES + _OTHERS_BYTES
        self._slots = torch.zeros(self._num_processes, self._num_slots, num_bytes, dtype=torch.uint8).share_memory_()
        self._num_noted = torch.zeros(self._num_processes, dtype=torch.int64).share_memory_()
        self._num_before = [0] * self._num_processes
        noting = _Noting(self._collate, self._slots, self._num_noted)
        loader.__dict__["collate_fn"] = noting
        loader.__dict__["worker_init_fn"] = _Beginning(self._init, noting, states)

    def state_dict(self, *, num_given: int) -> dict[str, Any] | None:
        """As of this iteration's first `num_given` batches; None before the first iteration. Waits for processes that
        have not begun."""
        if self._slots is None:
            return self._resumed
        noted = [self._noted(process, number) for process, number in enumerate(self._num_made(num_given))]
        own = [noted[(process - self._first) % self._num_processes] for process in range(self._num_processes)]
        return {"states": own, "next": (self._first + num_given) % self._num_processes}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """For the next iteration; of another number of processes it says nothing."""
        if state is not None and len(state["states"]) == self._num_processes:
            self._resumed = state

    def _first_states(self, is_going_on: bool) -> list[dict[str, Any] | None]:
        resumed, self._resumed, self._first = self._resumed, None, 0
        if resumed is None or not (is_going_on or self._is_persistent):
            return [None] * self._num_processes
        states: list[dict[str, Any] | None] = resumed["states"]
        if is_going_on:
            # A DataLoader has its first process make the next batch, whichever would have had its turn.
            self._first = resumed["next"]
        return [*states[self._first :], *states[: self._first]]

    def _num_made(self, num_batches: int) -> list[int]:
        """By each process, once the iteration has got so far."""
        return [
            before + len(range(process, num_batches, self._num_processes))
            for process, before in enumerate(self._num_before)
        ]

    def _noted(self, process: int, number: int) -> dict[str, Any] | None:
        assert self._slots is not None
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self._num_noted[process] <= number:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.005)
        slot = self._slots[process, number % self._num_slots]
        of_torch, size, others = slot.split([slot.numel() - _SIZE_BYTES - _OTHERS_BYTES, _SIZE_BYTES, _OTHERS_BYTES])
        num_bytes = int.from_bytes(size.tolist(), "little")
        if num_bytes == 0:
            return None
        python, numpy = pickle.loads(bytes(others[:num_bytes].tolist()))
        state: dict[str, Any] = {"torch": of_torch.clone(), "python": python}
        return state if numpy is None else {**state, "numpy": format.to_plain_values(numpy, "numpy.random")}


class SeedingByRank:
    """A DataLoader's `worker_init_fn` for a loader with a `generator` of its own, which is alike on all ranks: torch
    seeds the processes from it, and those of another rank than the first are to draw other numbers."""

    def __init__(self, init: Callable[[int], None] | None, *, rank: int) -> None:
        self._init = init
        self._rank = rank

    def __call__(self, process: int) -> None:
        diverge_random_state(self._rank)
        if self._init is not None:
            self._init(process)


class _Noting:
    """A DataLoader's `collate_fn` that notes the random state once a batch is made: the next one begins with it."""

    def __init__(self, collate: Callable[[Any], Any], slots: Tensor, num_noted: Tensor) -> None:
        self._collate = collate
        self._slots = slots
        self._num_noted = num_noted

    def __call__(self, samples: Any) -> Any:
        batch = self._collate(samples)
        self.note()
        return batch

    def note(self) -> None:
        info = get_worker_info()
        if info is None:
            return
        numpy = sys.modules.get("numpy")
        others = pickle.dumps((random.getstate(), None if numpy is None else numpy.random.get_state(legacy=False)))
        num_bytes = len(others) if len(others) <= _OTHERS_BYTES else 0
        number = int(self._num_noted[info.id])
        slot = self._slots[info.id, number % self._slots.shape[1]]
        slot[: -_SIZE_BYTES - _OTHERS_BYTES] = torch.get_rng_state()
        packed = num_bytes.to_bytes(_SIZE_BYTES, "little") + others[:num_bytes]
        slot[-_SIZE_BYTES - _OTHERS_BYTES :][: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        # Last: it says that the rest is there.
        self._num_noted[info.id] = number + 1


class _Beginning:
    """A DataLoader's `worker_init_fn`: the user's, then the random state with which the process is to begin."""

    def __init__(
        self, init: Callable[[int], None] | None, noting: _Noting, states: list[dict[str, Any] | None]
    ) -> None:
        self._init = init
        self._noting = noting
        self._states = states

    def __call__(self, process: int) -> None:
        if self._init is not None:
            self._init(process)
        state = self._states[process]
        if state is not None:
            format.set_random_state(state)
        self._noting.note()
