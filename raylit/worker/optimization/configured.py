"""What `configure_optimizers` returns, brought into one form. Worker."""

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
    """A learning-rate scheduler and when it steps."""

    scheduler: Any
    interval: Literal["epoch", "step"] = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None
    reduce_on_plateau: bool = False
    opt_idx: int | None = None
    """Index of the optimizer that it belongs to."""
    step_hook: Callable[[Any, Any], None] | None = None
    """The module's own `lr_scheduler_step`."""

    def step(self, metrics: dict[str, float]) -> None:
        """Step, with the monitored metric where the scheduler follows one."""
        metric = None
        if self.reduce_on_plateau:
            if self.monitor not in metrics:
                self._miss(metrics)
                return
            metric = metrics[self.monitor]
        if self.step_hook is not None:
            self.step_hook(self.scheduler, metric)
        elif metric is None:
            self.scheduler.step()
        else:
            self.scheduler.step(metric)

    def _miss(self, metrics: dict[str, float]) -> None:
        message = f"ReduceLROnPlateau follows {self.monitor!r}, which is not logged; there are: {sorted(metrics)}"
        if self.strict:
            raise ConfigError(f"{message}. Log it, monitor one of these, or set strict=False to skip the step")
        warnings.warn(f"{message}. The scheduler does not step", stacklevel=2)


@dataclass(kw_only=True, slots=True)
class Configured:
    """The optimizers of a run, in the user's order, and their schedulers."""

    optimizers: list[Optimizer]
    schedules: list[Schedule]
    frequencies: tuple[int, ...] | None = None
    """For how many batches in turn each optimizer is used; None: all of them in every batch."""


class NoOptimizer(Optimizer):
    """In place of an optimizer where `configure_optimizers` returns None: the loop runs, no weight moves."""

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


def read_configured_optimizers(module: LightningModule) -> Configured:
    """Call `configure_optimizers` and read its answer."""
    answer = module.configure_optimizers()
    if answer is None:
        warnings.warn(
            "configure_optimizers returned None: the loop runs, but nothing optimizes the weights", stacklevel=2
        )
        return Configured(optimizers=[NoOptimizer()], schedules=[])
    optimizers, schedules, frequencies = _read(answer)
    if not optimizers or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
        raise ModuleError(f"configure_optimizers returned {type(answer).__name__}: {answer!r}; return {_FORMS}")
    step_hook = module.lr_scheduler_step if is_overridden("lr_scheduler_step", module, LightningModule) else None
    for schedule in schedules:
        schedule.step_hook = step_hook
        if schedule.opt_idx is None:
            followed = getattr(schedule.scheduler, "optimizer", None)
            schedule.opt_idx = next((i for i, own in enumerate(optimizers) if own is followed), None)
    if frequencies and len(optimizers) > 1:
        if len(frequencies) != len(optimizers):
            raise ConfigError("configure_optimizers gives some optimizers a 'frequency': give one to each, or to none")
        if any(frequency < 1 for frequency in frequencies):
            raise ConfigError(f"configure_optimizers: 'frequency' of {frequencies}: must be counts of at least 1")
        return Configured(optimizers=optimizers, schedules=schedules, frequencies=tuple(frequencies))
    return Configured(optimizers=optimizers, schedules=schedules)


def _read(answer: Any) -> tuple[list[Any], list[Schedule], list[int]]:
    """Optimizers, schedules and those frequencies that are given."""
    if isinstance(answer, Optimizer):
        return [answer], [], []
    if isinstance(answer, dict):
        return _read_dicts([answer])
    if not isinstance(answer, (list, tuple)):
        return [], [], []
    if len(answer) == 2 and isinstance(answer[0], (list, tuple)):
        schedulers = answer[1] if isinstance(answer[1], (list, tuple)) else [answer[1]]
        return list(answer[0]), [_schedule(scheduler) for scheduler in schedulers], []
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
            schedule = _schedule(entry["lr_scheduler"], monitor=entry.get("monitor"))
            schedule.opt_idx = index
            schedules.append(schedule)
    return optimizers, schedules, frequencies


def _schedule(given: Any, *, monitor: str | None = None) -> Schedule:
    if not isinstance(given, dict):
        given = {"scheduler": given}
    unknown = set(given) - _SCHEDULER_KEYS
    if unknown or "scheduler" not in given:
        raise ConfigError(
            f"lr_scheduler with the keys {sorted(given)}: must have 'scheduler' and may have {sorted(_SCHEDULER_KEYS)}"
        )
    schedule = Schedule(**{"monitor": monitor, **given})
    if isinstance(schedule.scheduler, ReduceLROnPlateau):
        schedule.reduce_on_plateau = True
    if schedule.reduce_on_plateau and schedule.monitor is None:
        raise ConfigError("a ReduceLROnPlateau scheduler needs a metric: return {'scheduler': ..., 'monitor': name}")
    if schedule.interval not in ("epoch", "step"):
        raise ConfigError(f"lr_scheduler interval={schedule.interval!r}: must be 'epoch' or 'step'")
    if isinstance(schedule.frequency, bool) or not isinstance(schedule.frequency, int) or schedule.frequency < 1:
        raise ConfigError(f"lr_scheduler frequency={schedule.frequency!r}: must be a count of at least 1")
    return schedule
