"""What `configure_optimizers` returns, brought into one form. Worker."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from raylit.errors import ConfigError, ModuleError
from raylit.module import LightningModule

_FORMS = "an optimizer; [optimizer]; ([optimizer], [scheduler]); {'optimizer': ..., 'lr_scheduler': ...}"
_KEYS = {"scheduler", "interval", "frequency", "monitor", "strict", "name", "reduce_on_plateau"}


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

    def step(self, metrics: dict[str, float]) -> None:
        """Step, with the monitored metric where the scheduler follows one."""
        if not self.reduce_on_plateau:
            self.scheduler.step()
            return
        if self.monitor in metrics:
            self.scheduler.step(metrics[self.monitor])
        elif self.strict:
            raise ConfigError(
                f"ReduceLROnPlateau follows {self.monitor!r}, which is not logged; there are: {sorted(metrics)}"
            )


def configured(module: LightningModule) -> tuple[Optimizer, list[Schedule]]:
    """Call `configure_optimizers` and read its answer."""
    answer = module.configure_optimizers()
    optimizer, schedulers = _split(answer)
    if not isinstance(optimizer, Optimizer):
        raise ModuleError(f"configure_optimizers returned {type(answer).__name__}: {answer!r}; return {_FORMS}")
    return optimizer, [_schedule(scheduler) for scheduler in schedulers]


def _split(answer: Any) -> tuple[Any, Sequence[Any]]:
    if isinstance(answer, dict):
        scheduler = answer.get("lr_scheduler")
        return answer.get("optimizer"), [] if scheduler is None else [scheduler]
    if isinstance(answer, (list, tuple)) and len(answer) == 2 and all(isinstance(x, (list, tuple)) for x in answer):
        return (answer[0][0], answer[1]) if len(answer[0]) == 1 else (answer[0], answer[1])
    if isinstance(answer, (list, tuple)) and len(answer) == 1:
        return _split(answer[0])
    return answer, []


def _schedule(given: Any) -> Schedule:
    if not isinstance(given, dict):
        given = {"scheduler": given}
    unknown = set(given) - _KEYS
    if unknown or "scheduler" not in given:
        raise ConfigError(f"lr_scheduler with the keys {sorted(given)}: must have 'scheduler' and may have {_KEYS}")
    schedule = Schedule(**given)
    if isinstance(schedule.scheduler, ReduceLROnPlateau):
        schedule.reduce_on_plateau = True
    if schedule.reduce_on_plateau and schedule.monitor is None:
        raise ConfigError("a ReduceLROnPlateau scheduler needs a metric: return {'scheduler': ..., 'monitor': name}")
    if schedule.interval not in ("epoch", "step"):
        raise ConfigError(f"lr_scheduler interval={schedule.interval!r}: must be 'epoch' or 'step'")
    return schedule
