"""Objects that a worker gets from its process: the job of the user's objects, its ranks and its stop barrier."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raylit.callbacks.base import Callback
from raylit.compat.torch_dynamo import Compilations
from raylit.core.datamodule import DataModule
from raylit.core.module import LightningModule
from raylit.loggers.base import Logger
from raylit.profilers import Profiler
from raylit.worker.data.script_objects import ScriptObjects
from raylit.worker.data.shared_memory import SharedMemory
from raylit.worker.process.logger_proxy import LoggerFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerContext:
    """A worker's ranks and host. The ranks of one host are consecutive."""

    rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    num_nodes: int = 1
    host: str = "localhost"
    host_ip: str = "127.0.0.1"
    num_threads: int | None = None
    """CPU threads for torch; None leaves torch's setting."""


@dataclass(kw_only=True, slots=True)
class Job:
    """The user's objects of one run, pickled together so that references between them are kept."""

    module: LightningModule
    datamodule: DataModule | None = None
    callbacks: Sequence[Callback] = ()
    loaders: dict[str, Any] = field(default_factory=dict)
    """Loaders that were passed to the entry point, by stage "train", "validate", "test", "predict"."""
    compilations: Compilations = field(default_factory=dict)
    """How the user has compiled the module and its parts, which pickling drops."""
    profiler: Profiler | None = None
    ckpt_path: str | None = None
    """Path that the run's checkpoint was read from."""
    log_dir: str = "."
    loggers: Sequence[Logger | LoggerFacts] = ()
    """The driver's loggers in its own process; on other workers their facts."""
    script_objects: ScriptObjects = field(default_factory=dict)
    """In an actor: classes and functions of the user's script that came with these objects."""
    shared_memory: SharedMemory | None = None
    """In an actor: the memory of the data. Unmodified data is not sent back to the driver, which has it."""


class StopBarrier:
    """Barrier that another thread arms and at which the loop waits between two steps for its limit.

    No rank starts a step beyond the one that it returns from `hold`, so the furthest of these is a step at which every
    rank can still stop. Until then the loop only compares two numbers.
    """

    def __init__(self) -> None:
        self.num_done = 0
        """Optimizer steps, or evaluation batches, of the current command. Written by the loop."""
        self.limit = math.inf
        self._is_released = threading.Event()
        self._is_released.set()

    @property
    def is_on(self) -> bool:
        """True once the barrier has been armed in the current command."""
        return self.limit != math.inf

    def reset(self) -> None:
        """Disarm the barrier; called before a command starts."""
        self.num_done, self.limit = 0, math.inf

    def hold(self) -> int:
        """Arm the barrier and return the number of steps that this rank will not exceed while it waits."""
        self._is_released.clear()
        self.limit = -1
        return self.num_done + 1  # a step may have begun before the limit was set

    def release(self, limit: int) -> None:
        """Let the loop continue up to `limit` steps."""
        self.limit = limit
        self._is_released.set()

    def may_continue(self) -> bool:
        """Wait while the barrier is armed, then return whether the loop may run another step.

        The loop calls it once `num_done` has reached `limit`.
        """
        self._is_released.wait()
        return self.num_done < self.limit
