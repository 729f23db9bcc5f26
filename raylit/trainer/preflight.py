"""Check that the user's objects have what a stage needs, before any worker starts. Driver."""

import warnings
from typing import Any

from raylit.callbacks.on_exception_checkpoint import OnExceptionCheckpoint, SavesOnException
from raylit.callbacks.weight_averaging import StochasticWeightAveraging
from raylit.config import DDPStrategy, Plan
from raylit.core.module import LightningModule
from raylit.errors import ConfigError, ModuleError
from raylit.protocol.state import Stage
from raylit.strategies.ddp import find_sent_dtype
from raylit.worker.data.sources import HOOKS, has_loader
from raylit.worker.job import Job
from raylit.worker.loops.hooks import is_overridden

_STEPS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}


_WHOLE_MODEL_CALLBACKS = (OnExceptionCheckpoint, StochasticWeightAveraging)


def check_module(model: Any) -> None:
    """Raise ModuleError if the model is not an instance of LightningModule."""
    if isinstance(model, type):
        raise ModuleError(f"the class {model.__name__} was passed: pass an instance, {model.__name__}(...)")
    if not isinstance(model, LightningModule):
        raise ModuleError(f"model is a {type(model).__name__}: must be a raylit.LightningModule")


def require_automatic(module: LightningModule, plan: Plan) -> None:
    """Raise ConfigError for settings that need automatic optimization, if the module optimizes manually."""
    if module.automatic_optimization:
        return
    hook = plan.strategy.ddp_comm_hook if isinstance(plan.strategy, DDPStrategy) else None
    if callable(hook) and find_sent_dtype(hook) is None:
        raise ConfigError(
            f"ddp_comm_hook={hook!r} with automatic_optimization = False, where gradients are averaged without DDP's "
            "buckets: use 'bf16' or 'fp16', which work there too"
        )
    if plan.optimization.accumulation != ((0, 1),):
        raise ConfigError(
            "accumulate_grad_batches with automatic_optimization = False: the module decides when to step; call "
            "optimizer.step() every so many batches in training_step"
        )
    if plan.optimization.clip_val is not None:
        raise ConfigError(
            "gradient_clip_val with automatic_optimization = False: call self.clip_gradients(optimizer, "
            "gradient_clip_val=..., gradient_clip_algorithm=...) in training_step, before the step"
        )


def require_shardable(job: Job, plan: Plan) -> None:
    """Raise ConfigError for callbacks that cannot work in a fit that shards the model."""
    if not plan.strategy.is_sharding:
        return
    whole = [type(one).__name__ for one in job.callbacks if isinstance(one, _WHOLE_MODEL_CALLBACKS)]
    for is_wrong, what, instead in (
        (
            any(isinstance(one, SavesOnException) for one in job.callbacks),
            "ModelCheckpoint(save_on_exception=True)",
            "the worker whose hook raises has only its part of the model; save by every_n_train_steps",
        ),
        (bool(whole), f"the callback {', '.join(whole)}", "it needs the whole model in one process"),
    ):
        if is_wrong:
            raise ConfigError(f"strategy='fsdp' does not go together with {what}: {instead}; or use strategy='ddp'")


def require_weights(module: LightningModule, *, has_checkpoint: bool) -> None:
    """Raise ConfigError if the weights are on the meta device and no checkpoint is given."""
    if not has_checkpoint and any(parameter.is_meta for parameter in module.parameters()):
        raise ConfigError(
            f"the weights of this {type(module).__name__} are on the meta device, without numbers: pass "
            "ckpt_path='best' or a checkpoint's path; FSDPStrategy(gather_weights=False) leaves them there after a fit"
        )


def require_steps_and_loaders(job: Job, stage: Stage, *, is_validating: bool = False) -> None:
    """Raise ModuleError if a step, an optimizer or a loader that the stage needs is missing."""
    module, step = job.module, _STEPS[stage]
    name = type(module).__name__
    if stage != "predict" and not is_overridden(step, module, LightningModule):
        raise ModuleError(f"{name} has no {step}: define {step}(self, batch, batch_idx)")
    if stage == "fit" and not is_overridden("configure_optimizers", module, LightningModule):
        raise ModuleError(f"{name} has no configure_optimizers: define it and return an optimizer")
    source = "train" if stage == "fit" else stage
    if not has_loader(job, source):
        raise ModuleError(
            f"{stage} has no data: pass a loader or a DataModule to {stage}(), or define {HOOKS[source]} in {name}"
        )
    if is_validating:
        has_step = is_overridden("validation_step", module, LightningModule)
        if has_step != has_loader(job, "validate"):
            has, lacks = ("a validation_step", "loader") if has_step else ("a validation loader", "validation_step")
            warnings.warn(f"{name} runs with {has} but no {lacks}: validation is skipped", stacklevel=4)
