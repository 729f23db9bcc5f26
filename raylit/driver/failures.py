"""What went wrong in the workers, as one exception in the driver. Driver."""

from collections.abc import Sequence

import cloudpickle

from raylit.errors import RemoteTraceback, WorkerFailed
from raylit.messages import Failed


def raise_failures(failures: Sequence[Failed], *, num_workers: int) -> None:
    """Raise the exception of the lowest failed rank as itself, its cause being the traceback in the worker."""
    first = min(failures, key=lambda failure: failure.rank)
    ranks = ", ".join(str(failure.rank) for failure in sorted(failures, key=lambda failure: failure.rank))
    where = f"{'rank' if len(failures) == 1 else 'ranks'} {ranks} of {num_workers} on host {first.host}"
    cause = RemoteTraceback(f"In {where}:\n{first.traceback}")
    if first.error is None:
        raise WorkerFailed(f"an exception that cannot be pickled ended {where}") from cause
    raise cloudpickle.loads(first.error) from cause
