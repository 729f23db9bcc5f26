"""Averaged weights, by epoch or step, also of sharded parameters. Every worker."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_avg_fn
from torch.utils.hooks import RemovableHandle

from raylit.callbacks.base import Callback
from raylit.compat.torch_core import BatchNormBase, build_flat_module
from raylit.core.module import LightningModule
from raylit.core.trainer_view import TrainerView
from raylit.errors import ConfigError
from raylit.strategies.sharded_state import is_sharded

CURRENT_WEIGHTS = "current_weight"
"""Key in an optimizer's saved state for the current weight, if the checkpoint's module has the average."""
_Average = Callable[[Tensor, Tensor, Tensor], Tensor]


class WeightAveraging(Callback):
    """Callback that averages weights and, with `use_buffers`, buffers after each step.

    Override `should_update` for other times. Validation runs with the average, checkpoints contain it as their
    `state_dict`, and at the end of training the module has it. Before the first update there is no average: validation,
    checkpoints and a run that ends before it use the current weights.

    Args:
        device: Device that stores the average; None: the module's.
        use_buffers: Also average buffers.
        **kwargs: Passed to torch.optim.swa_utils.AveragedModel, such as `avg_fn` and `multi_avg_fn`; without them all
            steps have equal weight.
    """

    def __init__(self, device: torch.device | str | int | None = None, use_buffers: bool = True, **kwargs: Any) -> None:
        self._device = torch.device(device) if isinstance(device, str) else device
        self._use_buffers = use_buffers
        self._kwargs = kwargs
        self._average: AveragedModel | None = None
        self._has_average = False
        """True after the first update. Until then `_average` has the weights from before the training."""
        self._is_swapped = False
        """True while the module has the average's values, and the average the module's."""
        self._sharded: ShardedAverage | None = None
        self._hooks: list[RemovableHandle] = []
        self._latest_update_step = 0
        self._latest_update_epoch = -1

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether to update the average after this step, or after this epoch.

        Exactly one of the two is given, counted from 0. The default is after every step.
        """
        return step_idx is not None

    def setup(self, trainer: TrainerView, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget()  # a run that ended with an error may have left an average

    def on_fit_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if self._average is None:
            self._latest_update_step, self._latest_update_epoch = trainer.global_step, -1
            self._make_average(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            self._update(pl_module)
            self._latest_update_step = step

    def on_train_epoch_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if trainer.is_epoch_cut_short:
            return  # the run that does the rest of the epoch updates the average at its end
        if epoch > self._latest_update_epoch and self.should_update(epoch_idx=epoch):
            self._update(pl_module)
            self._latest_update_epoch = epoch

    def on_validation_epoch_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if self._has_average:
            self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if self._is_swapped:
            self._swap(pl_module)

    def on_train_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if not self._has_average:
            if trainer.is_global_zero and not trainer.fast_dev_run:
                warnings.warn(
                    f"{type(self).__name__} has averaged nothing in the {trainer.global_step} steps and "
                    f"{trainer.current_epoch + 1} epochs of this run; the module keeps the weights of its last step: "
                    "let the average begin earlier, or train longer",
                    stacklevel=2,
                )
            return
        for average, current in zip(
            _iterate_values(self._get_average().module), _iterate_values(build_local_module(pl_module)), strict=True
        ):
            current.copy_(average)

    def teardown(self, trainer: TrainerView, pl_module: LightningModule, stage: str) -> None:
        # Do not copy a second model back to the driver.
        self._forget()

    def _forget(self) -> None:
        if self._sharded is not None:
            self._sharded.close()
        for hook in self._hooks:
            hook.remove()
        self._average, self._sharded, self._hooks = None, None, []
        self._has_average = self._is_swapped = False

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._latest_update_step, "latest_update_epoch": self._latest_update_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._latest_update_step = state_dict["latest_update_step"]
        self._latest_update_epoch = state_dict.get("latest_update_epoch", -1)

    def on_save_checkpoint(self, trainer: TrainerView, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._has_average:
            return
        if self._sharded is not None:
            self._save_beside_parts(pl_module, checkpoint)
        elif self._is_swapped:
            self._swap(pl_module)
            self._save(pl_module, checkpoint)
            self._swap(pl_module)
        else:
            self._save(pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: TrainerView, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # The loaded weights are the start of the average, or the average itself.
        self._make_average(trainer, pl_module)
        self._latest_update_step, self._latest_update_epoch = checkpoint["global_step"], -1
        if "current_model_state" not in checkpoint or "averaging_state" not in checkpoint:
            return
        self._get_average().n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
        self._has_average = int(checkpoint["averaging_state"]["n_averaged"]) > 0
        # Sharded checkpoints contain only buffers here: the optimizers' states bring the current weights.
        current = checkpoint["current_model_state"]
        for name, value in itertools.chain(pl_module.named_parameters(), pl_module.named_buffers()):
            if name in current:
                _copy_value(value.data, current[name])

    def _make_average(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        device = pl_module.device if self._device is None else self._device
        part = build_local_module(pl_module)
        self._average = AveragedModel(part, device=device, use_buffers=self._use_buffers, **self._kwargs)
        self._has_average = False
        if has_shards(pl_module):
            self._sharded = ShardedAverage(
                pl_module,
                trainer.optimizers,
                average=self._average.module,
                has_average=lambda: self._has_average,
                is_swapped=lambda: self._is_swapped,
            )
        self._hooks = [
            optimizer.register_load_state_dict_pre_hook(load_current_weights) for optimizer in trainer.optimizers
        ]

    def _get_average(self) -> AveragedModel:
        assert self._average is not None
        return self._average

    def _update(self, pl_module: nn.Module) -> None:
        self._get_average().update_parameters(build_local_module(pl_module))
        self._has_average = True

    def _swap(self, pl_module: nn.Module) -> None:
        for average, current in zip(
            _iterate_values(self._get_average().module), _iterate_values(build_local_module(pl_module)), strict=True
        ):
            previous = average.clone()
            average.copy_(current)
            current.copy_(previous)
        self._is_swapped = not self._is_swapped

    def _save(self, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        # Copied, because validation swaps the values while the checkpoint may still be being written.
        state = {name: _copy_to_cpu(value) for name, value in self._get_average().state_dict().items()}
        current = pl_module.state_dict()
        checkpoint["current_model_state"] = {name: _copy_to_cpu(value) for name, value in current.items()}
        prefix = "module."
        checkpoint["state_dict"] = {
            name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
        }
        checkpoint["averaging_state"] = {name: value for name, value in state.items() if not name.startswith(prefix)}

    def _save_beside_parts(self, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        holder = self._get_average().module if self._is_swapped else pl_module
        checkpoint["current_model_state"] = {name: value.cpu().clone() for name, value in holder.named_buffers()}
        checkpoint["averaging_state"] = {"n_averaged": self._get_average().n_averaged.cpu().clone()}


class EMAWeightAveraging(WeightAveraging):
    """Callback that keeps an exponential moving average: `decay * average + (1 - decay) * weights`.

    Args:
        device: Device that stores the average; None: the module's.
        use_buffers: Also average buffers.
        decay: Weight of the previous average, from 0 to 1.
        update_every_n_steps: Optimizer steps between two updates.
        update_starting_at_step: First step, from 0, after which to update; None: from the start.
        update_starting_at_epoch: First epoch, from 0, after whose end to update as well; None: never.
        **kwargs: Passed to `WeightAveraging`.

    Raises:
        ConfigError: if `decay` is out of range.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ConfigError(f"EMAWeightAveraging(decay={decay}): must be from 0 to 1")
        super().__init__(device, use_buffers, **kwargs, avg_fn=get_ema_avg_fn(decay))
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is not None:
            is_started = self.update_starting_at_step is None or step_idx >= self.update_starting_at_step
            return is_started and self.update_every_n_steps > 0 and step_idx % self.update_every_n_steps == 0
        first_epoch = self.update_starting_at_epoch
        return epoch_idx is not None and first_epoch is not None and epoch_idx >= first_epoch


def has_shards(module: nn.Module) -> bool:
    """Return whether any parameter is sharded."""
    return any(is_sharded(parameter) for parameter in module.parameters())


def build_local_module(module: nn.Module) -> nn.Module:
    """Return a module with this rank's parameters and buffers by name, which can be copied.

    They share memory with the originals; of sharded parameters this rank's shards. A module without shards is returned
    itself.
    """
    for part in module.modules():
        if isinstance(reshard := getattr(part, "reshard", None), MethodType):
            reshard()  # during an evaluation some parameters may still be gathered
    if not has_shards(module):
        return module
    parameters = (
        (name, nn.Parameter(_to_local(parameter.detach()), requires_grad=parameter.requires_grad))
        for name, parameter in module.named_parameters()
    )
    return build_flat_module(parameters, module.named_buffers())


class ShardedAverage:
    """State-dict hooks that make each rank save its shards of an average.

    The average is saved as the module's weights, and the current weights in the optimizers' states, until `close`.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        average: nn.Module,
        has_average: Callable[[], bool],
        is_swapped: Callable[[], bool],
    ) -> None:
        """Register the hooks.

        `average` has the structure of `build_local_module`'s result; its values count once `has_average()` is True.
        While `is_swapped()` is True, the module and the average have each other's values.
        """
        self._average = average
        self._has_average = has_average
        self._is_swapped = is_swapped
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._hooks: list[RemovableHandle] = [module.register_state_dict_post_hook(partial(self._put_average))]
        self._hooks += [optimizer.register_state_dict_post_hook(self._add_current) for optimizer in optimizers]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _put_average(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        if self._is_swapped() or not self._has_average():
            return
        averages = {**dict(self._average.named_parameters()), **dict(self._average.named_buffers())}
        # Tied parameters have several names.
        names = {
            name: self._names[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)
        }
        for name, value in state_dict.items():
            average = averages.get(names.get(name, name))
            if average is not None and isinstance(value, Tensor):
                state_dict[name] = _make_shard(value, average.detach())

    def _add_current(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if not self._has_average():
            return state_dict
        averages = dict(self._average.named_parameters())
        state = dict(state_dict["state"])
        for index, parameter in _iterate_parameters(optimizer, state_dict):
            current = parameter.detach()
            if self._is_swapped():
                current = _make_shard(current, averages[self._names[id(parameter)]].detach())
            state[index] = {**state.get(index, {}), CURRENT_WEIGHTS: current}
        return {**state_dict, "state": state}


def load_current_weights(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Load current weights from an optimizer's state into the parameters, before the optimizer loads the state.

    Only checkpoints of a module with an average contain them.
    """
    state = dict(state_dict["state"])
    for index, parameter in _iterate_parameters(optimizer, state_dict):
        if CURRENT_WEIGHTS in (own_state := state.get(index, {})):
            parameter.detach().copy_(own_state[CURRENT_WEIGHTS])
            rest = {name: value for name, value in own_state.items() if name != CURRENT_WEIGHTS}
            state[index] = rest
            if not rest:
                del state[index]
    return {**state_dict, "state": state}


def _iterate_parameters(optimizer: Optimizer, state_dict: dict[str, Any]) -> Iterator[tuple[int, nn.Parameter]]:
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        yield from zip(saved["params"], group["params"], strict=True)


def _make_shard(whole: Any, local: Tensor) -> Tensor:
    if not is_sharded(whole):
        return local
    shard: Tensor = type(whole).from_local(
        local.to(whole.device),
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return shard


def _to_local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local


def _iterate_values(module: nn.Module) -> "itertools.chain[Tensor]":
    """Yield the values of the module's parameters and buffers, detached from the graph."""
    return itertools.chain((p.data for p in module.parameters()), (b.data for b in module.buffers()))


def _copy_to_cpu(value: Any) -> Any:
    """Copy a value to the CPU; the result of a module's `get_extra_state` may be no tensor."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else deepcopy(value)


def _copy_value(tensor: Tensor, value: Tensor) -> None:
    """Copy the value, or this rank's shard of it, into the tensor."""
    if is_sharded(tensor):
        from raylit.strategies.fsdp.shards import build_local_value

        value = build_local_value(value, tensor, "", {})
    tensor.copy_(value)


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
