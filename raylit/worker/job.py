"""Who a worker is, and the user's objects it runs. Worker."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raylit.callbacks.base import Callback
from raylit.core.compiled_modules import Compilations
from raylit.core.datamodule import DataModule
from raylit.core.module import LightningModule
from raylit.loggers.base import Logger
from raylit.profilers import Profiler
from raylit.worker.data.script_objects import ScriptObjects
from raylit.worker.data.shared_memory import SharedMemory
from raylit.worker.process.logger_proxy import LoggerFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerContext:
    """A worker's place among the others. Ranks of one host are consecutive."""

    rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    num_nodes: int = 1
    host: str = "localhost"
    host_ip: str = "127.0.0.1"
    num_threads: int | None = None
    """CPU threads for torch; None: as they are."""


@dataclass(kw_only=True, slots=True)
class Job:
    """The user's objects of one run. Pickled as one, so that what they share stays shared."""

    module: LightningModule
    datamodule: DataModule | None = None
    callbacks: Sequence[Callback] = ()
    loaders: dict[str, Any] = field(default_factory=dict)
    """What was given to fit and the others: by stage "train", "validate", "test", "predict"."""
    compilations: Compilations = field(default_factory=dict)
    """How the user has compiled the module and its parts, which pickling drops."""
    profiler: Profiler | None = None
    ckpt_path: str | None = None
    """Where the run's checkpoint was read."""
    log_dir: str = "."
    loggers: Sequence[Logger | LoggerFacts] = ()
    """The driver's loggers in its own process; elsewhere what is known of them."""
    script_objects: ScriptObjects = field(default_factory=dict)
    """In an actor: what of the user's script has come with these objects."""
    shared_memory: SharedMemory | None = None
    """In an actor: where the data lies. It stays out of what goes back to the driver, which has it."""
