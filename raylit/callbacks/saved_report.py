"""SavedReport: what a callback that reports a run with a checkpoint of it has in common with another. Driver."""

from raylit.callbacks.base import DriverCallback, Run
from raylit.errors import CheckpointError


class SavedReport(DriverCallback):
    """Whoever gets the report counts on its checkpoint: it is there before, or the save's error ends the run."""

    def save(self, run: Run, path: str) -> None:
        run.save_checkpoint(path)
        run.finish_saves()

    def on_save_end(self, run: Run, path: str, error: CheckpointError | None) -> None:
        if error is not None:
            raise error
