"""StochasticWeightAveraging: averages the weights of the last epochs, with a learning rate of its own. Every worker."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR

from raylit.callbacks.base import Callback
from raylit.compat.torch_core import BatchNormBase
from raylit.core.module import LightningModule
from raylit.core.trainer_view import TrainerView
from raylit.errors import ConfigError

_Average = Callable[[Tensor, Tensor, Tensor], Tensor]


class StochasticWeightAveraging(Callback):
    """Callback for stochastic weight averaging (Izmailov et al. 2018, https://arxiv.org/abs/1803.05407).

    From `swa_epoch_start` on the weights at the start of each epoch are averaged. The learning rate is annealed to
    `swa_lrs`, and the optimizer's scheduler ends. After the last epoch the module has the average; batch norms
    recompute their statistics in one more pass over the training data, over the batches of all workers.

    Args:
        swa_lrs: Final learning rate, one for all parameter groups or a list with one for each.
        swa_epoch_start: First averaged epoch, counted from 1; a float is a fraction of max_epochs.
        annealing_epochs: Number of epochs in which the learning rate goes to `swa_lrs`.
        annealing_strategy: "cos" or "linear".
        avg_fn: `avg_fn(average, weights, num_averaged)` returns the new average; None weights all epochs equally.
        device: Device that stores the average; None: the module's.

    Raises:
        ConfigError: if an argument is invalid; at the start of fit, if there are several optimizers or schedulers,
            manual optimization, or no max_epochs.
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
        avg_fn: _Average | None = None,
        device: torch.device | str | None = "cpu",
    ) -> None:
        start, rates = swa_epoch_start, swa_lrs if isinstance(swa_lrs, list) else [swa_lrs]
        for is_wrong, message in (
            (
                isinstance(start, bool) or (start < 1 if isinstance(start, int) else not 0.0 <= start <= 1.0),
                f"swa_epoch_start={start!r}: must be an epoch, from 1, or a fraction of max_epochs, from 0.0 to 1.0",
            ),
            (
                not rates or not all(isinstance(rate, float) and rate > 0 for rate in rates),
                f"swa_lrs={swa_lrs!r}: must be a positive float, or a list with one for each parameter group",
            ),
            (
                annealing_strategy not in ("cos", "linear"),
                f"annealing_strategy={annealing_strategy!r}: 'cos', 'linear'",
            ),
            (annealing_epochs < 0, f"annealing_epochs={annealing_epochs}: must be at least 0"),
            (avg_fn is not None and not callable(avg_fn), f"avg_fn={avg_fn!r}: must be a function of three tensors"),
        ):
            if is_wrong:
                raise ConfigError(f"StochasticWeightAveraging({message})")
        self.swa_epoch_start = swa_epoch_start
        self.swa_lrs = swa_lrs
        self.num_averaged = 0
        self._annealing_epochs = annealing_epochs
        self._annealing_strategy: Literal["cos", "linear"] = annealing_strategy
        self._avg_fn = avg_fn or _average_evenly
        self._device = device
        self._first_epoch = self._last_epoch = 0
        self._latest_update_epoch = -1
        self._scheduler: SWALR | None = None
        self._scheduler_state: dict[str, Any] | None = None
        """State from a checkpoint, until the scheduler is built."""
        self._average: dict[str, Tensor] = {}

    def setup(self, trainer: TrainerView, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.num_averaged, self._latest_update_epoch = 0, -1
            self._scheduler, self._scheduler_state, self._average = None, None, {}

    def on_load_checkpoint(self, trainer: TrainerView, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        if state.get("scheduler_state") is not None:
            # SWALR had replaced the user's scheduler, whose state is not in the checkpoint.
            trainer.lr_scheduler_configs.clear()

    def on_fit_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1 or len(trainer.lr_scheduler_configs) > 1:
            raise ConfigError("StochasticWeightAveraging works with one optimizer and at most one scheduler")
        if not pl_module.automatic_optimization:
            raise ConfigError("StochasticWeightAveraging works with automatic optimization only")
        if trainer.max_epochs is None:
            raise ConfigError("StochasticWeightAveraging needs the Trainer's max_epochs, to know which are the last")
        start = self.swa_epoch_start
        self._first_epoch = max((int(trainer.max_epochs * start) if isinstance(start, float) else start) - 1, 0)
        self._last_epoch = trainer.max_epochs - 1
        if self._scheduler_state is not None:
            self._scheduler = self._build_scheduler(trainer)

    def on_train_epoch_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if not self._first_epoch <= epoch <= self._last_epoch:
            return
        if self._scheduler is None:
            self._scheduler = self._build_scheduler(trainer)
        if epoch > self._latest_update_epoch:
            self._update(pl_module)
            self._latest_update_epoch = epoch

    def on_train_epoch_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if self._scheduler is not None and not trainer.is_epoch_cut_short:
            self._scheduler.step()

    def on_train_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if trainer.current_epoch != self._last_epoch or not trainer.is_epoch_ended or not self._average:
            return
        for name, parameter in pl_module.named_parameters():
            parameter.data.copy_(self._average[name])
        norms = [module for module in pl_module.modules() if isinstance(module, BatchNormBase)]
        if norms:
            _update_statistics(norms, trainer)

    def teardown(self, trainer: TrainerView, pl_module: LightningModule, stage: str) -> None:
        # Do not copy a second set of weights and an optimizer back to the driver.
        self._average, self._scheduler = {}, None

    def state_dict(self) -> dict[str, Any]:
        return {
            "n_averaged": self.num_averaged,
            "latest_update_epoch": self._latest_update_epoch,
            "scheduler_state": None if self._scheduler is None else _drop_functions(self._scheduler),
            "average_model_state": {name: average.cpu().clone() for name, average in self._average.items()} or None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_averaged = state_dict["n_averaged"]
        self._latest_update_epoch = state_dict["latest_update_epoch"]
        self._scheduler_state = state_dict["scheduler_state"]
        self._average = dict(state_dict["average_model_state"] or {}) if self.num_averaged else {}

    def _build_scheduler(self, trainer: TrainerView) -> SWALR:
        """Build the scheduler, which replaces the run's own."""
        [optimizer] = trainer.optimizers
        groups = optimizer.param_groups
        rates = self.swa_lrs if isinstance(self.swa_lrs, list) else [self.swa_lrs] * len(groups)
        if len(rates) != len(groups):
            raise ConfigError(
                f"StochasticWeightAveraging(swa_lrs={rates}): the optimizer has {len(groups)} parameter groups"
            )
        for rate, group in zip(rates, groups, strict=True):
            group["initial_lr"] = rate
        # The same value as in Lightning, so that runs give the same numbers.
        last_epoch = trainer.max_epochs if self._annealing_strategy == "cos" else -1
        all_rates: Any = rates  # torch's annotation allows only a single rate
        before = [group["lr"] for group in groups]
        scheduler = SWALR(optimizer, all_rates, self._annealing_epochs, self._annealing_strategy, last_epoch)
        if self._scheduler_state is not None:
            scheduler.load_state_dict(self._scheduler_state)
            self._scheduler_state = None
            for rate, group in zip(before, groups, strict=True):
                group["lr"] = rate  # the new scheduler's constructor has changed it
        trainer.lr_scheduler_configs.clear()
        return scheduler

    @torch.no_grad()
    def _update(self, module: nn.Module) -> None:
        count = torch.tensor(self.num_averaged)
        for name, parameter in module.named_parameters():
            device = parameter.device if self._device is None else self._device
            weights = parameter.detach().to(device)
            if self.num_averaged == 0:
                self._average[name] = weights.clone()
            else:
                average = self._average[name].to(device)
                self._average[name] = self._avg_fn(average, weights, count.to(device))
        self.num_averaged += 1


def _average_evenly(average: Tensor, weights: Tensor, num_averaged: Tensor) -> Tensor:
    return average + (weights - average) / (num_averaged + 1)


def _drop_functions(scheduler: SWALR) -> dict[str, Any]:
    state: dict[str, Any] = scheduler.state_dict()
    return {name: value for name, value in state.items() if not callable(value)}


def _update_statistics(norms: list[Any], trainer: TrainerView) -> None:
    """Recompute the batch norms' statistics as the mean over the batches of one epoch."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    trainer.fit_loop.forward_epoch()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
