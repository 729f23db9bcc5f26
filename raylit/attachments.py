"""What is attached to a Trainer: callbacks, sorted by the side they run on, and loggers. Driver."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from raylit.callbacks.base import Callback, DriverCallback
from raylit.callbacks.early_stopping import EarlyStopping
from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.callbacks.model_summary import ModelSummary
from raylit.callbacks.progress_bar import ProgressBar
from raylit.callbacks.timer import Duration, Timer
from raylit.errors import ConfigError
from raylit.loggers import Logger, TensorBoardLogger
from raylit.loggers.dummy import DummyLogger

_Callback = TypeVar("_Callback", bound=DriverCallback)


def sorted_callbacks(
    *,
    callbacks: Callback | DriverCallback | Sequence[Callback | DriverCallback] | None,
    enable_checkpointing: bool | ModelCheckpoint,
    early_stop_callback: bool | EarlyStopping,
    enable_progress_bar: bool | ProgressBar,
    enable_model_summary: bool | ModelSummary,
    max_time: Duration | None,
    fast_dev_run: bool | int,
) -> tuple[list[Callback], list[DriverCallback]]:
    """The workers' callbacks and the driver's; checkpointing comes last, so that it sees what the others decided."""
    given = [] if callbacks is None else [callbacks] if not isinstance(callbacks, (list, tuple)) else list(callbacks)
    for callback in given:
        if not isinstance(callback, (Callback, DriverCallback)):
            raise ConfigError(f"callbacks holds a {type(callback).__name__}: must be a Callback or a DriverCallback")
    bars = _chosen(ProgressBar, given, ProgressBar, enable_progress_bar=enable_progress_bar)
    summaries = _chosen(ModelSummary, given, ModelSummary, enable_model_summary=enable_model_summary)
    saves = _chosen(ModelCheckpoint, given, ModelCheckpoint.automatic, enable_checkpointing=enable_checkpointing)
    # False is the default here, and says nothing against a callback of the user's.
    is_stopping = early_stop_callback or any(isinstance(callback, EarlyStopping) for callback in given)
    stops = _chosen(EarlyStopping, given, EarlyStopping, early_stop_callback=is_stopping)
    first, last = [*bars, *summaries], [] if fast_dev_run else saves
    timers = [] if max_time is None or fast_dev_run else [Timer(max_time)]
    placed = (*bars, *summaries, *saves)
    others = [c for c in [*given, *timers, *stops] if isinstance(c, DriverCallback) and c not in placed]
    ordered = dict.fromkeys([*first, *others, *last])
    return [callback for callback in given if isinstance(callback, Callback)], list(ordered)


def _chosen(
    kind: type[_Callback], given: list[Any], default: Callable[[], _Callback], **switch: bool | _Callback
) -> list[_Callback]:
    """Those of a kind: the one that is given in the switch's place, the user's, else the default where it is on."""
    [(name, value)] = switch.items()
    own = [callback for callback in given if isinstance(callback, kind)]
    if isinstance(value, kind):
        return list(dict.fromkeys([value, *own]))
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: must be True, False or a {kind.__name__}")
    if own and not value:
        raise ConfigError(f"{name}=False, but callbacks holds a {kind.__name__}: leave one of them out")
    return own or ([default()] if value else [])


def build_loggers(*, logger: Any, fast_dev_run: bool | int, default_root_dir: str) -> list[Logger]:
    """TensorBoard's by default; in a run that writes nothing one that keeps nothing, for the hooks that log."""
    if isinstance(logger, bool):
        loggers: list[Logger] = [TensorBoardLogger()] if logger else []
    else:
        loggers = list(logger) if isinstance(logger, (list, tuple)) else [logger]
    for each in loggers:
        if not isinstance(each, Logger):
            raise ConfigError(f"logger={each!r}: must be True, False, a Logger or a list of them")
    if fast_dev_run and loggers:
        return [DummyLogger()]
    for each in loggers:
        each.bind(default_root_dir)
    return loggers
