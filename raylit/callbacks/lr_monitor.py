"""LearningRateMonitor: learning rates among the metrics. Runs on every worker."""

from collections import Counter
from typing import Any, Literal

from torch.optim import Optimizer

from raylit.callbacks.base import Callback
from raylit.errors import ConfigError


class LearningRateMonitor(Callback):
    """Logs each optimizer's learning rate, with `log_momentum` and `log_weight_decay` those too.

    `logging_interval="step"`: that of every logging step; "epoch": that which each epoch begins with; None: as often as
    the scheduler changes it, and at logging steps where there is none. Names: `lr-Adam`; `lr-Adam/pg1`, `/pg2` of
    several parameter groups, by their own "name" where they have one; `lr-Adam-1` of a second optimizer of a kind; the
    "name" of a scheduler's dict takes the place of all that.
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise ConfigError(
                f"LearningRateMonitor(logging_interval={logging_interval!r}): must be 'step', 'epoch' or None"
            )
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        """Every value that was logged, by its name."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.lrs = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.logging_interval != "epoch" and trainer.is_logging_step:
            for name, value in self._values(trainer, interval="step").items():
                pl_module.log(name, value, on_step=True, on_epoch=False)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.logging_interval != "step":
            for name, value in self._values(trainer, interval="epoch").items():
                pl_module.log(name, value, on_step=False, on_epoch=True, batch_size=1)

    def _values(self, trainer: Any, *, interval: str) -> dict[str, float]:
        """Of the optimizers that are logged at this interval."""
        values: dict[str, float] = {}
        for optimizer, name, own_interval in _named_optimizers(trainer):
            if interval != (self.logging_interval or own_interval):
                continue
            names = _group_names(optimizer, name)
            for group, group_name in zip(optimizer.param_groups, names, strict=True):
                # A scheduler may keep it as a tensor.
                values[group_name] = float(group["lr"])
                self._note(group_name, values[group_name], is_single=len(names) == 1)
                if self.log_momentum:
                    momentum = group["betas"][0] if "betas" in optimizer.defaults else group.get("momentum", 0)
                    values[f"{group_name}-momentum"] = float(momentum)
                if self.log_weight_decay:
                    values[f"{group_name}-weight_decay"] = float(group.get("weight_decay", 0))
        return values

    def _note(self, name: str, value: float, *, is_single: bool) -> None:
        if not is_single and name.endswith("/pg1") and name not in self.lrs:
            # The only group so far has got company.
            self.lrs[name] = self.lrs.pop(name.removesuffix("/pg1"), [])
        self.lrs.setdefault(name, []).append(value)


def _named_optimizers(trainer: Any) -> list[tuple[Optimizer, str, str]]:
    """Each optimizer with its name and how often its scheduler steps; those with schedulers first."""
    found: list[tuple[Optimizer, str | None, str]] = [
        (config.scheduler.optimizer, config.name, config.interval) for config in trainer.lr_scheduler_configs
    ]
    followed = [optimizer for optimizer, _, _ in found]
    found += [(one, None, "step") for one in trainer.optimizers if not any(one is other for other in followed)]
    seen: Counter[str] = Counter()
    named = []
    for optimizer, given, interval in found:
        name = given or f"lr-{type(optimizer).__name__}"
        seen[name] += 1
        named.append((optimizer, name if seen[name] == 1 else f"{name}-{seen[name] - 1}", interval))
    return named


def _group_names(optimizer: Optimizer, name: str) -> list[str]:
    groups = optimizer.param_groups
    own = [group["name"] for group in groups if "name" in group]
    if len(set(own)) < len(own):
        raise ConfigError(f"LearningRateMonitor: the parameter groups of {name} share a name: {', '.join(own)}")
    if len(groups) == 1:
        return [f"{name}/{own[0]}" if own else name]
    return [f"{name}/{group.get('name', f'pg{number}')}" for number, group in enumerate(groups, start=1)]
