"""Results of `configure_optimizers` in one form. Worker."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from raylit.core.module import LightningModule
from raylit.errors import ConfigError, ModuleError
from raylit.worker.loops.hooks import is_overridden

_FORMS = (
    "an optimizer, a list of them, ([optimizers], [schedulers]), {'optimizer': ..., 'lr_scheduler': ...}, several such "
    "dicts, or None"
)
_OPTIMIZER_KEYS = {"optimizer", "lr_scheduler", "monitor", "frequency"}
_SCHEDULER_KEYS = {"scheduler", "interval", "frequency", "monitor", "strict", "name", "reduce_on_plateau", "opt_idx"}


@dataclass(kw_only=True, slots=True)
class Schedule:
    """Learning rate scheduler with the times at which it steps."""

    scheduler: Any
    interval: Literal["epoch", "step"] = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None
    reduce_on_plateau: bool = False
    opt_idx: int | None = None
    """Index of the optimizer whose learning rate it sets."""
    step_hook: Callable[[Any, Any], None] | None = None
    """The module's own `lr_scheduler_step`, if it overrides that."""

    def step(self, metrics: dict[str, float]) -> None:
        """Step the scheduler, with the monitored metric if it is a plateau scheduler."""
        metric = None
        if self.reduce_on_plateau:
            if self.monitor not in metrics:
                self._report_missing(metrics)
                return
            metric = metrics[self.monitor]
        if self.step_hook is not None:
            self.step_hook(self.scheduler, metric)
        elif metric is None:
            self.scheduler.step()
        else:
            self.scheduler.step(metric)

    def _report_missing(self, metrics: dict[str, float]) -> None:
        message = f"ReduceLROnPlateau follows {self.monitor!r}, which is not logged; there are: {sorted(metrics)}"
        if self.strict:
            raise ConfigError(f"{message}. Log it, monitor one of these, or set strict=False to skip the step")
        warnings.warn(f"{message}. The scheduler does not step", stacklevel=2)


@dataclass(kw_only=True, slots=True)
class ConfiguredOptimizers:
    """Optimizers of a run, in the user's order, with their schedulers."""

    optimizers: list[Optimizer]
    schedules: list[Schedule]
    frequencies: tuple[int, ...] | None = None
    """Numbers of consecutive batches for which each optimizer is used; None: all of them are used in every batch."""


class NoOptimizer(Optimizer):
    """Optimizer that does nothing, for modules whose `configure_optimizers` returns None."""

    def __init__(self) -> None:
        self.param_groups, self.state, self.defaults = [], {}, {}  # type: ignore[assignment]

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def __getstate__(self) -> dict[str, Any]:
        return {}


def read_configured_optimizers(module: LightningModule) -> ConfiguredOptimizers:
    """Call `configure_optimizers` and convert what it returns.

    Raises:
        ModuleError: it returns something else than optimizers.
        ConfigError: a dict has unknown or missing keys, or a value that is not allowed.
    """
    answer = module.configure_optimizers()
    if answer is None:
        warnings.warn(
            "configure_optimizers returned None: the loop runs, but nothing optimizes the weights", stacklevel=2
        )
        return ConfiguredOptimizers(optimizers=[NoOptimizer()], schedules=[])
    optimizers, schedules, frequencies = _read(answer)
    if not optimizers or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
        raise ModuleError(f"configure_optimizers returned {type(answer).__name__}: {answer!r}; return {_FORMS}")
    step_hook = module.lr_scheduler_step if is_overridden("lr_scheduler_step", module, LightningModule) else None
    for schedule in schedules:
        schedule.step_hook = step_hook
        if schedule.opt_idx is None:
            scheduled_optimizer = getattr(schedule.scheduler, "optimizer", None)
            schedule.opt_idx = next((i for i, own in enumerate(optimizers) if own is scheduled_optimizer), None)
    if frequencies and len(optimizers) > 1:
        if len(frequencies) != len(optimizers):
            raise ConfigError("configure_optimizers gives some optimizers a 'frequency': give one to each, or to none")
        if any(frequency < 1 for frequency in frequencies):
            raise ConfigError(f"configure_optimizers: 'frequency' of {frequencies}: must be counts of at least 1")
        return ConfiguredOptimizers(optimizers=optimizers, schedules=schedules, frequencies=tuple(frequencies))
    return ConfiguredOptimizers(optimizers=optimizers, schedules=schedules)


def _read(answer: Any) -> tuple[list[Any], list[Schedule], list[int]]:
    """Return the optimizers, the schedules and the frequencies that the answer has."""
    if isinstance(answer, Optimizer):
        return [answer], [], []
    if isinstance(answer, dict):
        return _read_dicts([answer])
    if not isinstance(answer, (list, tuple)):
        return [], [], []
    if len(answer) == 2 and isinstance(answer[0], (list, tuple)):
        schedulers = answer[1] if isinstance(answer[1], (list, tuple)) else [answer[1]]
        return list(answer[0]), [_read_schedule(scheduler) for scheduler in schedulers], []
    if answer and all(isinstance(entry, dict) for entry in answer):
        return _read_dicts(answer)
    if len(answer) == 1 and isinstance(answer[0], (list, tuple)):
        return _read(answer[0])
    return list(answer), [], []


def _read_dicts(answer: Sequence[dict[str, Any]]) -> tuple[list[Any], list[Schedule], list[int]]:
    optimizers, schedules, frequencies = [], [], []
    for index, entry in enumerate(answer):
        unknown = set(entry) - _OPTIMIZER_KEYS
        if unknown or "optimizer" not in entry:
            raise ConfigError(
                f"configure_optimizers returned a dict with the keys {sorted(entry)}: must have 'optimizer' and may "
                f"have {sorted(_OPTIMIZER_KEYS)}"
            )
        optimizers.append(entry["optimizer"])
        if entry.get("frequency") is not None:
            frequencies.append(entry["frequency"])
        if entry.get("lr_scheduler") is not None:
            schedule = _read_schedule(entry["lr_scheduler"], monitor=entry.get("monitor"))
            schedule.opt_idx = index
            schedules.append(schedule)
    return optimizers, schedules, frequencies


def _read_schedule(config: Any, *, monitor: str | None = None) -> Schedule:
    if not isinstance(config, dict):
        config = {"scheduler": config}
    unknown = set(config) - _SCHEDULER_KEYS
    if unknown or "scheduler" not in config:
        raise ConfigError(
            f"lr_scheduler with the keys {sorted(config)}: must have 'scheduler' and may have {sorted(_SCHEDULER_KEYS)}"
        )
    schedule = Schedule(**{"monitor": monitor, **config})
    if isinstance(schedule.scheduler, ReduceLROnPlateau):
        schedule.reduce_on_plateau = True
    if schedule.reduce_on_plateau and schedule.monitor is None:
        raise ConfigError("a ReduceLROnPlateau scheduler needs a metric: return {'scheduler': ..., 'monitor': name}")
    if schedule.interval not in ("epoch", "step"):
        raise ConfigError(f"lr_scheduler interval={schedule.interval!r}: must be 'epoch' or 'step'")
    if isinstance(schedule.frequency, bool) or not isinstance(schedule.frequency, int) or schedule.frequency < 1:
        raise ConfigError(f"lr_scheduler frequency={schedule.frequency!r}: must be a count of at least 1")
    return schedule
