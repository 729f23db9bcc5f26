"""RaySession: the run of a user's function by Ray Tune or Ray Train that this code is part of. Driver."""

import sys
from collections.abc import Mapping
from typing import Any, Protocol

from raylit.compat import ray_train


class RaySession(Protocol):
    """What Ray knows of the function under way, and wants to be told."""

    name: str
    """For messages."""

    @property
    def world_size(self) -> int:
        """How many processes run the same function together."""
        ...

    @property
    def num_reports(self) -> int:
        """By whomever; it only grows."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """What the function was called with."""
        ...

    @property
    def checkpoint(self) -> Any:
        """A ray Checkpoint that the function is to continue from, or the last that it has reported; None: neither."""
        ...

    def checkpoint_of(self, directory: str) -> Any:
        """A ray Checkpoint of a local directory."""
        ...

    def report(self, metrics: dict[str, Any], checkpoint: Any) -> None:
        """Hand over a result, and a Checkpoint or None. SystemExit: Ray wants the function to end."""
        ...


def current_session() -> RaySession | None:
    """None: neither Tune nor Train runs this process, or Tune does with a class trainable, whose results are what its
    `step` returns."""
    session = ray_train.find_function_session()
    if session is not None:
        return _Session(session)
    functions = ray_train.find_train_functions()
    return None if functions is None else _Functions(functions)


class _Session:
    """Of a function trainable of Tune, and of a worker of Train's first version."""

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
        return ray_train.read_trial_config(self._session)

    @property
    def checkpoint(self) -> Any:
        return self._session.loaded_checkpoint

    def checkpoint_of(self, directory: str) -> Any:
        package = sys.modules["ray.tune" if self._is_tune else "ray.train"]
        return package.Checkpoint.from_directory(directory)

    def report(self, metrics: dict[str, Any], checkpoint: Any) -> None:
        self._session.report(metrics, checkpoint=checkpoint)


class _Functions:
    """Of a worker of Train's second version."""

    name = "a worker of Ray Train"

    def __init__(self, functions: Any) -> None:
        self._functions = functions
        self._context = functions.get_context()

    @property
    def world_size(self) -> int:
        return self._context.get_world_size()

    @property
    def num_reports(self) -> int:
        return ray_train.count_train_reports()

    @property
    def config(self) -> Mapping[str, Any]:
        return {}  # it is the same whenever Train starts the function anew

    @property
    def checkpoint(self) -> Any:
        return self._functions.get_checkpoint()

    def checkpoint_of(self, directory: str) -> Any:
        return sys.modules["ray.train"].Checkpoint.from_directory(directory)

    def report(self, metrics: dict[str, Any], checkpoint: Any) -> None:
        sys.modules["ray.train"].report(metrics, checkpoint=checkpoint)
