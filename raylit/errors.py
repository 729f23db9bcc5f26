"""The exceptions of raylit, one tree. Raised in the driver wherever the driver can know; never swallowed."""


class RaylitError(Exception):
    """Base of everything that raylit raises on its own account."""


class ConfigError(RaylitError, ValueError):
    """An argument, or a combination of arguments, that cannot work. Raised before a worker starts."""


class UnknownArgumentError(ConfigError, TypeError):
    """A keyword that the Trainer does not know. The message names the nearest one that it does."""


class ModuleError(RaylitError, TypeError):
    """A module, data module or loader that lacks something the asked-for run needs."""


class CheckpointError(RaylitError):
    """A checkpoint that cannot be written, read or applied."""


class ResourcesError(RaylitError):
    """The cluster has not, and cannot get, what the run asks for."""


class WorkerDied(RaylitError):
    """A worker process ended without being asked to: killed, crashed, or its host was lost."""

    def __init__(self, *, rank: int, host: str, reason: str) -> None:
        super().__init__(f"worker of rank {rank} on host {host} died: {reason}")
        self.rank = rank
        self.host = host
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _worker_died, (self.rank, self.host, self.reason)


class WorkerFailed(RaylitError):
    """A hook raised an exception that cannot travel to the driver as itself; the message is its traceback."""


class RemoteTraceback(Exception):
    """The traceback of an exception as it stood in the worker; the `__cause__` of the one raised in the driver."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


def _worker_died(rank: int, host: str, reason: str) -> WorkerDied:
    return WorkerDied(rank=rank, host=host, reason=reason)
