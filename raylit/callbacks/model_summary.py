"""ModelSummary: prints the model's layers and parameters once when a fit starts. Driver only."""

from raylit.callbacks.base import DriverCallback, Run
from raylit.errors import ConfigError
from raylit.text_table import printable


class ModelSummary(DriverCallback):
    """Driver callback that prints the model's layers after `setup` and `configure_model` have run.

    If the module has an `example_input_array`, the layers' input and output sizes are shown as well.

    Args:
        max_depth: Depth of the layers to print; 0 prints only the totals, -1 all layers.

    Raises:
        ConfigError: if it is less than -1 or not an int.
    """

    def __init__(self, max_depth: int = 1) -> None:
        if isinstance(max_depth, bool) or not isinstance(max_depth, int) or max_depth < -1:
            raise ConfigError(f"ModelSummary(max_depth={max_depth!r}): must be -1 (all layers), 0 (none) or more")
        self.max_depth = max_depth

    def on_start(self, run: Run) -> None:
        if run.state.summary is not None:
            print(printable(str(run.state.summary)))
