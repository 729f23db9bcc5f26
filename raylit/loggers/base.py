"""Logger: where the driver sends metrics and hyper-parameters. Driver only."""

from collections.abc import Mapping
from typing import Any


class Logger:
    """A destination of metrics. Lives in the driver; a worker never writes to it."""

    @property
    def name(self) -> str | None:
        """Directory below the root directory, None where there is none."""
        return None

    @property
    def version(self) -> int | str | None:
        return None

    @property
    def save_dir(self) -> str | None:
        """The root directory: the logger's own, else the Trainer's, set by `bind`."""
        return None

    @property
    def log_dir(self) -> str | None:
        """`save_dir/name/version_N`; checkpoints go beside the log."""
        return None

    def bind(self, default_root_dir: str) -> None:
        """The Trainer's root directory, for a logger that was given none. Called before anything else."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Scalars at a step of the x axis."""
        raise NotImplementedError

    def log_hyperparams(self, params: Mapping[str, Any]) -> None: ...

    def save(self) -> None:
        """Bring everything logged so far to where others can read it."""

    def finalize(self, status: str) -> None:
        """The run is over: "success", "failed" or "interrupted"."""
