"""BaseFinetuning and BackboneFinetuning: parts of a module are trained from some epoch on. Run on every worker."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from raylit.callbacks.base import Callback
from raylit.compat.torch_core import BatchNormBase
from raylit.core.module import LightningModule
from raylit.core.trainer_view import TrainerView
from raylit.errors import CheckpointError, ConfigError, ModuleError

Modules: TypeAlias = "nn.Module | Iterable[Modules]"
"""A module, or modules in collections of any depth."""


def multiplicative(epoch: int) -> float:
    """Double the backbone's learning rate with every epoch; the default of `BackboneFinetuning(lambda_func=...)`."""
    return 2.0


class BaseFinetuning(Callback):
    """Base of callbacks that freeze and unfreeze parts of a module.

    Override `freeze_before_training` and `finetune_function`; the static methods help with both. A resumed run restores
    the optimizers' parameter groups, which parameters are trained, and which modules are in eval mode.
    """

    def __init__(self) -> None:
        self._groups: dict[int, list[dict[str, Any]]] = {}
        """By optimizer index, the parameter groups' settings with names in place of parameters."""
        self._trained: list[str] = []
        """Names of the parameters that require a gradient."""
        self._tracking: list[str] = []
        """Names of the batch norms that track running statistics."""
        self._in_eval_mode: list[str] | None = None
        """Names of the modules in eval mode at the start of the epoch; None before the first epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        """Freeze what is not trained from the start; the optimizers are created afterwards."""
        raise NotImplementedError(f"{type(self).__name__} needs a freeze_before_training")

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze what is due; called at the start of each epoch, for each optimizer."""
        raise NotImplementedError(f"{type(self).__name__} needs a finetune_function")

    @staticmethod
    def flatten_modules(modules: Modules) -> list[nn.Module]:
        """Return all leaf modules, and the parents that have parameters of their own."""
        if isinstance(modules, nn.ModuleDict):
            modules = modules.values()
        if isinstance(modules, nn.Module) and not isinstance(modules, nn.ModuleList):
            candidates: Iterable[nn.Module] = modules.modules()
        else:
            candidates = [leaf for part in modules for leaf in BaseFinetuning.flatten_modules(part)]
        return [
            module for module in candidates if not list(module.children()) or list(module.parameters(recurse=False))
        ]

    @staticmethod
    def filter_params(modules: Modules, train_bn: bool = True, requires_grad: bool = True) -> Iterator[nn.Parameter]:
        """Yield the parameters whose `requires_grad` is as given; those of batch norms only with `train_bn`."""
        for module in BaseFinetuning.flatten_modules(modules):
            if train_bn or not isinstance(module, BatchNormBase):
                yield from (p for p in module.parameters(recurse=False) if p.requires_grad == requires_grad)

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        """Unfreeze the modules' parameters, and let batch norms track statistics."""
        for module in BaseFinetuning.flatten_modules(modules):
            _set_trained(module, is_trained=True)

    @staticmethod
    def freeze_module(module: nn.Module) -> None:
        """Freeze the module's own parameters, not those of its children."""
        _set_trained(module, is_trained=False)

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Freeze all parameters in the modules; with `train_bn` batch norms are trained instead."""
        for module in BaseFinetuning.flatten_modules(modules):
            _set_trained(module, is_trained=train_bn and isinstance(module, BatchNormBase))

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters that the optimizer does not have yet; warn about the others."""
        existing = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        candidates = list(params)
        new = [parameter for parameter in candidates if id(parameter) not in existing]
        if len(new) < len(candidates):
            warnings.warn(
                f"{len(candidates) - len(new)} of the parameters to be unfrozen are in the optimizer already and get "
                "no group of their own: give it only those that are trained from the start, "
                f"{type(optimizer).__name__}(p for p in self.parameters() if p.requires_grad)",
                stacklevel=3,
            )
        return new

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Train the modules as a new parameter group with learning rate `lr`.

        By default that is the first group's learning rate divided by `initial_denom_lr`.
        """
        BaseFinetuning.make_trainable(modules)
        rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else float(lr)
        params = BaseFinetuning.filter_params(modules, train_bn=train_bn, requires_grad=True)
        if new := BaseFinetuning.filter_on_optimizer(optimizer, params):
            optimizer.add_param_group({"params": new, "lr": rate})

    def setup(self, trainer: TrainerView, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._groups, self._trained, self._tracking, self._in_eval_mode = {}, [], [], None
            self.freeze_before_training(pl_module)

    def on_train_epoch_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            self.finetune_function(pl_module, trainer.current_epoch, optimizer)
        self._record(trainer, pl_module)
        self._in_eval_mode = [name for name, module in pl_module.named_modules() if not module.training]

    def state_dict(self) -> dict[str, Any]:
        return {
            "internal_optimizer_metadata": self._groups,
            "trained": self._trained,
            "tracking": self._tracking,
            "in_eval_mode": self._in_eval_mode,
        }

    def on_save_checkpoint(self, trainer: TrainerView, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # A hook may have unfrozen parameters since the epoch's start.
        self._record(trainer, pl_module)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_load_checkpoint(self, trainer: TrainerView, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Done here because the optimizers' states, which are loaded next, need these groups.
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is None:
            return
        self._groups = state["internal_optimizer_metadata"]
        parameters = dict(pl_module.named_parameters())
        for index, optimizer in enumerate(trainer.optimizers):
            _restore_groups(optimizer, self._groups.get(index, []), parameters)
        if "tracking" in state:
            self._trained, self._tracking = state["trained"], state["tracking"]
            self._in_eval_mode = state["in_eval_mode"]
            self._restore(pl_module)
            return
        # Checkpoints of Lightning contain the groups only, those of earlier raylit versions the trained parameters,
        # too. The rest stays as `freeze_before_training` has left it.
        added = {name for groups in self._groups.values() for group in groups for name in group["params"]}
        self._trained = state.get("trained", sorted(added))
        self._thaw(pl_module)

    def _record(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        self._groups = {
            index: [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
            for index, optimizer in enumerate(trainer.optimizers)
        }
        self._trained = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
        self._tracking = [name for name, norm in _named_batch_norms(pl_module) if norm.track_running_stats]

    def _restore(self, pl_module: nn.Module) -> None:
        trained, tracking = set(self._trained), set(self._tracking)
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_(name in trained)
        for name, norm in _named_batch_norms(pl_module):
            norm.track_running_stats = name in tracking
        if self._in_eval_mode is not None:
            in_eval_mode = set(self._in_eval_mode)
            for name, module in pl_module.named_modules():
                module.training = name not in in_eval_mode

    def _thaw(self, pl_module: nn.Module) -> None:
        trained = set(self._trained)
        for name, parameter in pl_module.named_parameters():
            if name in trained:
                parameter.requires_grad_(True)
        for name, norm in _named_batch_norms(pl_module):
            names = {f"{name}.{leaf}" if name else leaf for leaf, _ in norm.named_parameters(recurse=False)}
            if names and names <= trained:
                norm.track_running_stats = True


class BackboneFinetuning(BaseFinetuning):
    """Callback that trains the module's `backbone` from an epoch on, with a lower learning rate than the rest.

    Args:
        unfreeze_backbone_at_epoch: Epoch, from 0, at whose start the backbone is unfrozen.
        lambda_func: Function of the epoch by which the backbone's learning rate is multiplied in each further epoch.
        backbone_initial_ratio_lr: Initial learning rate of the backbone as a fraction of the first group's.
        backbone_initial_lr: Initial learning rate of the backbone; wins over the ratio.
        should_align: Limit the backbone's learning rate to the first group's.
        initial_denom_lr: Passed to `unfreeze_and_add_param_group`.
        train_bn: Train the backbone's batch norms from the start.
        verbose: Print both learning rates each epoch.
        rounding: Number of digits to print.

    Raises:
        ConfigError: if the epoch is negative.
        ModuleError: at setup, if the module has no `backbone`.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 10e-2,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        super().__init__()
        if unfreeze_backbone_at_epoch < 0:
            raise ConfigError(
                f"BackboneFinetuning(unfreeze_backbone_at_epoch={unfreeze_backbone_at_epoch}): must be at least 0"
            )
        self.unfreeze_backbone_at_epoch = unfreeze_backbone_at_epoch
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr = backbone_initial_lr
        self.should_align = should_align
        self.initial_denom_lr = initial_denom_lr
        self.train_bn = train_bn
        self.verbose = verbose
        self.rounding = rounding
        self.previous_backbone_lr: float | None = None

    def setup(self, trainer: TrainerView, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(getattr(pl_module, "backbone", None), nn.Module):
            raise ModuleError(
                f"BackboneFinetuning: {type(pl_module).__name__} has no `backbone`: set self.backbone = nn.Module(...)"
            )
        if stage == "fit":
            self.previous_backbone_lr = None
        super().setup(trainer, pl_module, stage)

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=self.train_bn)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        first, previous = optimizer.param_groups[0]["lr"], self.previous_backbone_lr
        if epoch == self.unfreeze_backbone_at_epoch:
            initial = self.backbone_initial_lr
            rate = first * self.backbone_initial_ratio_lr if initial is None else initial
            self.unfreeze_and_add_param_group(
                pl_module.backbone, optimizer, rate, train_bn=self.train_bn, initial_denom_lr=self.initial_denom_lr
            )
        elif epoch > self.unfreeze_backbone_at_epoch and previous is not None:
            rate = self.lambda_func(epoch + 1) * previous
            rate = first if self.should_align and rate > first else rate
            optimizer.param_groups[-1]["lr"] = rate
        else:
            return
        self.previous_backbone_lr = rate
        if self.verbose:
            pl_module.print(f"epoch {epoch}: lr {round(first, self.rounding)}, backbone {round(rate, self.rounding)}")

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]


def _restore_groups(optimizer: Optimizer, groups: list[dict[str, Any]], parameters: Mapping[str, nn.Parameter]) -> None:
    """Give each group the parameters that it had when its state was saved, because states are loaded by position."""
    if missing := [name for group in groups for name in group["params"] if name not in parameters]:
        raise CheckpointError(
            f"the checkpoint's optimizer trains parameters that this module does not have: {', '.join(missing[:3])}: "
            "resume with the module that it was saved with"
        )
    restored_groups = [{**group, "params": [parameters[name] for name in group["params"]]} for group in groups]
    for group, saved in zip(optimizer.param_groups, restored_groups, strict=False):
        group["params"] = saved["params"]
    for saved in restored_groups[len(optimizer.param_groups) :]:
        optimizer.add_param_group(saved)


def _named_batch_norms(module: nn.Module) -> Iterator[tuple[str, BatchNormBase]]:
    return ((name, part) for name, part in module.named_modules() if isinstance(part, BatchNormBase))


def _set_trained(module: nn.Module, *, is_trained: bool) -> None:
    if isinstance(module, BatchNormBase):
        module.track_running_stats = is_trained
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(is_trained)
