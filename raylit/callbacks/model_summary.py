"""ModelSummary: the model's layers and parameters, shown once when a fit starts. Driver only."""

from raylit.callbacks.base import DriverCallback, Run
from raylit.errors import ConfigError
from raylit.text_table import printable


class ModelSummary(DriverCallback):
    """Prints layers down to `max_depth` (0: only the totals, -1: all) as they are once `setup` and `configure_model`
    have run. With an `example_input_array` on the module the layers' sizes are shown as well."""

    def __init__(self, max_depth: int = 1) -> None:
        if isinstance(max_depth, bool) or not isinstance(max_depth, int) or max_depth < -1:
            raise ConfigError(f"ModelSummary(max_depth={max_depth!r}): must be -1 (all layers), 0 (none) or more")
        self.max_depth = max_depth

    def on_start(self, run: Run) -> None:
        if run.state.summary is not None:
            print(printable(str(run.state.summary)))
