"""The Ray Tune or Ray Train session that runs the calling function. Driver."""

import sys
from collections.abc import Mapping
from typing import Any, Protocol

from raylit.compat import ray_core


class RaySession(Protocol):
    """Session of Tune or Train, with what raylit reads from it and reports to it."""

    name: str
    """Description for messages."""

    @property
    def world_size(self) -> int:
        """Number of processes that run the same function together."""
        ...

    @property
    def num_reports(self) -> int:
        """Number of reports by any code in this process; it only grows."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The config that the function was called with."""
        ...

    @property
    def checkpoint(self) -> Any:
        """Ray Checkpoint to continue from, or the last one that the function has reported, or None."""
        ...

    def make_checkpoint(self, directory: str) -> Any:
        """Create a Ray Checkpoint of a local directory."""
        ...

    def report(self, metrics: dict[str, Any], checkpoint: Any) -> None:
        """Report a result with a Checkpoint or None. SystemExit: Ray wants the function to end."""
        ...


def current_session() -> RaySession | None:
    """Return the session of this process, or None.

    None: neither Tune nor Train runs this process, or Tune runs a class trainable, whose results are what its `step`
    returns.
    """
    session = ray_core.find_function_session()
    if session is not None:
        return _FunctionSession(session)
    functions = ray_core.find_train_functions()
    return None if functions is None else _TrainWorkerSession(functions)


class _FunctionSession:
    """Session of a function trainable of Tune, or of a worker of Train's first version."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._is_tune = session.world_rank is None
        self.name = "a trial of Ray Tune" if self._is_tune else "a worker of Ray Train"

    @property
    def world_size(self) -> int:
        return 1 if self._is_tune else self._session.world_size

    @property
    def num_reports(self) -> int:
        return self._session.iteration

    @property
    def config(self) -> Mapping[str, Any]:
        return ray_core.read_trial_config(self._session)

    @property
    def checkpoint(self) -> Any:
        return self._session.loaded_checkpoint

    def make_checkpoint(self, directory: str) -> Any:
        package = sys.modules["ray.tune" if self._is_tune else "ray.train"]
        return package.Checkpoint.from_directory(directory)

    def report(self, metrics: dict[str, Any], checkpoint: Any) -> None:
        self._session.report(metrics, checkpoint=checkpoint)


class _TrainWorkerSession:
    """Session of a worker of Train's second version."""

    name = "a worker of Ray Train"

    def __init__(self, functions: Any) -> None:
        self._functions = functions
        self._context = functions.get_context()

    @property
    def world_size(self) -> int:
        return self._context.get_world_size()

    @property
    def num_reports(self) -> int:
        return ray_core.count_train_reports()

    @property
    def config(self) -> Mapping[str, Any]:
        return {}  # it is the same whenever Train restarts the function

    @property
    def checkpoint(self) -> Any:
        return self._functions.get_checkpoint()

    def make_checkpoint(self, directory: str) -> Any:
        return sys.modules["ray.train"].Checkpoint.from_directory(directory)

    def report(self, metrics: dict[str, Any], checkpoint: Any) -> None:
        sys.modules["ray.train"].report(metrics, checkpoint=checkpoint)
