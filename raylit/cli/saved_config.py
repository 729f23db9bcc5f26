"""SavedConfig: the run's whole configuration, beside its checkpoints. Driver only."""

from raylit.callbacks.base import DriverCallback, Run
from raylit.places import check_stays_below, joined, write_text


class SavedConfig(DriverCallback):
    """Writes `config.yaml` into the run's log directory as it starts."""

    def __init__(self, text: str, filename: str = "config.yaml") -> None:
        check_stays_below(filename, f"the config's file name {filename!r}")
        self._text = text
        self._filename = filename

    def on_start(self, run: Run) -> None:
        if run.state.stage == "fit" and not run.plan.is_dev_run:
            write_text(self._text, joined(run.log_dir, self._filename))
