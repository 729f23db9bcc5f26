"""LightningModule: the class that users subclass, with every hook and its default. Driver and workers."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from raylit.accelerators.transfer import is_namedtuple, to_device
from raylit.core import export
from raylit.core.hparams import HyperparametersMixin, load_weights, read_for_rebuild, rebuild
from raylit.core.trainer_view import MetricLog, TrainerView
from raylit.core.weights import read_weights, write_weights
from raylit.errors import ConfigError, ModuleError
from raylit.protocol.summary import Summary, summarize


class LoopHooks(nn.Module):
    """Hooks of the loops, in the order in which they are called; every worker calls them."""

    def setup(self, stage: str) -> None:
        """Prepare the module; called on every worker before the loaders are created. May be defined without `stage`."""

    def teardown(self, stage: str) -> None: ...
    def configure_model(self) -> None: ...
    def on_fit_start(self) -> None: ...
    def on_fit_end(self) -> None: ...
    def on_sanity_check_start(self) -> None: ...
    def on_sanity_check_end(self) -> None: ...
    def on_train_start(self) -> None: ...
    def on_train_end(self) -> None: ...
    def on_train_epoch_start(self) -> None: ...
    def on_train_epoch_end(self) -> None: ...
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Return -1 to end the epoch before this batch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...
    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None: ...
    def on_before_backward(self, loss: Tensor) -> None: ...
    def on_after_backward(self) -> None: ...
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None: ...
    def on_validation_start(self) -> None: ...
    def on_validation_end(self) -> None: ...
    def on_validation_model_eval(self) -> None:
        """Switch to eval mode before the loop."""
        self.eval()

    def on_validation_model_train(self) -> None:
        """Switch to train mode after the loop. If not overridden, each submodule returns to its previous mode."""
        self.train()

    def on_validation_epoch_start(self) -> None: ...
    def on_validation_epoch_end(self) -> None: ...
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_start(self) -> None: ...
    def on_test_end(self) -> None: ...
    def on_test_model_eval(self) -> None:
        """Switch to eval mode before the loop."""
        self.eval()

    def on_test_model_train(self) -> None:
        """Switch to train mode after the loop. If not overridden, each submodule returns to its previous mode."""
        self.train()

    def on_test_epoch_start(self) -> None: ...
    def on_test_epoch_end(self) -> None: ...
    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_start(self) -> None: ...
    def on_predict_end(self) -> None: ...
    def on_predict_model_eval(self) -> None:
        """Switch to eval mode before the loop."""
        self.eval()

    def on_predict_model_train(self) -> None:
        """Switch to train mode after the loop. If not overridden, each submodule returns to its previous mode."""
        self.train()

    def on_predict_epoch_start(self) -> None: ...
    def on_predict_epoch_end(self) -> None: ...
    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
    def on_exception(self, exception: BaseException) -> None: ...


_OF_THE_RUN = ("_view", "_metrics")
"""Attributes of the worker's current run; copies and pickles omit them."""


class LightningModule(HyperparametersMixin, LoopHooks):
    """Base of modules: an nn.Module with training, validation, test and prediction steps, and their hooks."""

    if TYPE_CHECKING:
        _view: TrainerView | None
        _metrics: MetricLog | None
    # torch.jit.script would try to compile annotated attributes.
    _view = None
    _metrics = None
    example_input_array: Any = None
    automatic_optimization: bool = True
    """False: `training_step` runs backward passes and optimizers itself (`optimizers`, `manual_backward`)."""
    truncated_bptt_steps: int | None = None
    """Length of the pieces of truncated back-propagation, as the Trainer's argument of this name."""

    # The steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a batch.

        Args:
            *args: `(batch, batch_idx)`, and what the options of the run add.
            **kwargs: The same by name.

        Returns:
            A scalar tensor with a gradient, a dict with it under `loss`, a TrainResult, or None to skip the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} has no training_step")

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch, in eval mode without gradients; gets `(batch, batch_idx[, dataloader_idx])`."""
        raise NotImplementedError(f"{type(self).__name__} has no validation_step")

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch, in eval mode without gradients; gets `(batch, batch_idx[, dataloader_idx])`."""
        raise NotImplementedError(f"{type(self).__name__} has no test_step")

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the prediction for a batch; gets `(batch, batch_idx[, dataloader_idx])`.

        The default is `self(batch)`. `predict` returns the predictions of all batches.
        """
        return self(args[0])

    def configure_optimizers(self) -> Any:
        """Return the optimizers and learning-rate schedulers.

        Returns:
            An optimizer; a list of them; `[optimizers], [schedulers]`; a dict with `optimizer`, `lr_scheduler` and
                `frequency`; several such dicts; or None.
        """
        raise NotImplementedError(f"{type(self).__name__} has no configure_optimizers")

    def configure_callbacks(self) -> Any:
        """Return callbacks, one or a list, for every run of this module; each replaces the Trainer's of its type."""
        return []

    # Data

    def prepare_data(self) -> None:
        """Download or tokenize; called in one process per host, before any `setup`.

        State set here is lost: leave files.
        """

    def train_dataloader(self) -> Any:
        """Return the training loader, or a collection of loaders."""
        raise NotImplementedError(f"{type(self).__name__} has no train_dataloader")

    def val_dataloader(self) -> Any:
        """Return the validation loader, or a list of loaders."""
        raise NotImplementedError(f"{type(self).__name__} has no val_dataloader")

    def test_dataloader(self) -> Any:
        """Return the test loader, or a list of loaders."""
        raise NotImplementedError(f"{type(self).__name__} has no test_dataloader")

    def predict_dataloader(self) -> Any:
        """Return the prediction loader, or a list of loaders."""
        raise NotImplementedError(f"{type(self).__name__} has no predict_dataloader")

    # Transfer of batches to the device; the data module's hooks win. A hook that is not overridden costs nothing

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch to move to the device; called in every loop, on every device, when the batch is needed."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch on `device`: every tensor in it, and every object with a `to` method."""
        return to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch for the step; it is on the device."""
        return batch

    # Logging

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a scalar for progress bar, loggers and callbacks.

        This does not communicate: values are reduced and read later, at logging steps and at the end of the epoch. What
        is read is reduced over all the ranks that logged the name.

        Args:
            name: Name of the metric.
            value: A number, a scalar tensor, or a torchmetrics metric.
            prog_bar: Show it in the progress bar.
            logger: Send it to the loggers; None: yes.
            on_step: Log the values of logging steps; None: in the training loop.
            on_epoch: Log the epoch's reduced value; None: outside the training loop.
            reduce_fx: "mean", "sum", "min", "max" or a function of the stacked values.
            enable_graph: Accepted for compatibility with Lightning.
            sync_dist: Accepted for compatibility with Lightning: values are always reduced over the ranks.
            sync_dist_group: Accepted for compatibility with Lightning.
            add_dataloader_idx: Append the loader's index to the name if there are several loaders.
            batch_size: Weight of the value in an epoch's mean; None: the first dimension of the batch's first tensor.
                With 0 the value does not count, and a mean of nothing else is nan.
            metric_attribute: Accepted for compatibility with Lightning.
            rank_zero_only: Log on rank 0 only.

        Raises:
            ConfigError: if it is called in a hook in which nothing can be logged.
        """
        if self._metrics is None:
            self._report_missing_run(name)
            return
        if rank_zero_only and self.global_rank != 0:
            return
        self._metrics.log(name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, batch_size, add_dataloader_idx)

    def log_dict(self, dictionary: Mapping[str, Any], **kwargs: Any) -> None:
        """Log each entry of a dict or a torchmetrics.MetricCollection; the keywords are those of `log`."""
        if hasattr(dictionary, "compute_groups"):
            # The members themselves, because copies would neither be reset nor updated.
            items = dictionary.items(keep_base=False, copy_state=False)  # type: ignore[call-arg]
        else:
            items = dictionary.items()
        for name, value in items:
            self.log(name, value, **kwargs)

    def _report_missing_run(self, name: str) -> None:
        if self._view is not None:
            raise ConfigError(
                f"self.log({name!r}) is called where nothing is collected: log in the hooks of batches and epochs of "
                "training, validation and test, not before or after the training, nor at the end of a whole "
                "validation or test, nor in prediction"
            )
        # Steps may be called by hand, without a Trainer.
        warnings.warn(f"self.log({name!r}) does nothing: no Trainer runs this module", stacklevel=3)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0 only."""
        if self.global_rank == 0:
            print(*args, **kwargs)

    # The worker's view of the run

    def attach_run(self, view: TrainerView | None) -> None:
        """Set the view of the run that `trainer` returns; None outside of runs. Called by the worker."""
        self._view = view

    def redirect_log(self, metrics: MetricLog | None) -> MetricLog | None:
        """Make `log` write to this buffer, or discard (None); return the previous one. For the worker's loops."""
        before, self._metrics = self._metrics, metrics
        return before

    @property
    def trainer(self) -> TrainerView:
        """The worker's view of the run; only available inside a run."""
        if self._view is None:
            raise RuntimeError(f"{type(self).__name__} is not inside a run: `trainer` is there in hooks only")
        return self._view

    @property
    def current_epoch(self) -> int:
        """Index of the current epoch; 0 outside a run."""
        return self._view.current_epoch if self._view is not None else 0

    @property
    def global_step(self) -> int:
        """Number of optimizer steps so far; 0 outside a run."""
        return self._view.global_step if self._view is not None else 0

    @property
    def global_rank(self) -> int:
        """This worker's rank; 0 outside a run."""
        return self._view.global_rank if self._view is not None else 0

    @property
    def local_rank(self) -> int:
        """This worker's rank among those of its host; 0 outside a run."""
        return self._view.local_rank if self._view is not None else 0

    @property
    def logger(self) -> Any:
        """The first logger; None without one."""
        return self._view.logger if self._view is not None else None

    @property
    def loggers(self) -> list[Any]:
        """All loggers."""
        return self._view.loggers if self._view is not None else []

    @property
    def device(self) -> torch.device:
        """Device of the first parameter, or else buffer; the CPU without any."""
        tensor = next(iter(self.parameters()), next(iter(self.buffers()), None))
        return tensor.device if tensor is not None else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first parameter; torch's default type without one."""
        tensor = next(iter(self.parameters()), None)
        return tensor.dtype if tensor is not None else torch.get_default_dtype()

    @property
    def on_gpu(self) -> bool:
        """True if the device is a CUDA device."""
        return self.device.type == "cuda"

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Gather values from all ranks. Collective.

        Args:
            data: Tensors or numbers, also in dicts and lists. Where first dimensions may differ between ranks
                (evaluation, the end of an epoch), shorter tensors are padded by repetition.
            group: Process group; None: all ranks.
            sync_grads: Let gradients flow back to each rank.

        Returns:
            The values stacked in a new first dimension; `data` unchanged if there is one rank.

        Raises:
            ModuleError: if tensors differ in other dimensions.
        """
        return data if self._view is None else self._view.all_gather(data, group=group, sync_grads=sync_grads)

    def get_progress_bar_dict(self) -> dict[str, Any]:
        """Return the numbers and texts that rank 0 sends to the progress bar in training; override it to add some."""
        return {} if self._metrics is None else dict(self._metrics.latest(only_prog_bar=True))

    # Optimization: hooks

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass, in automatic optimization and in `manual_backward`."""
        loss.backward(*args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Run the optimizer at the end of each accumulation window.

        An override must call `optimizer_closure`, which runs `training_step` and the backward pass and returns the
        loss, by `optimizer.step(closure=optimizer_closure)` or directly.
        """
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Set the gradients to zero."""
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip gradients before each step of automatic optimization, with the Trainer's arguments."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: float | None) -> None:
        """Run a scheduler; `metric` is the value that a ReduceLROnPlateau follows, else None."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def tbptt_split_batch(self, batch: Any, split_size: int) -> list[Any]:
        """Split a batch for truncated back-propagation, and return the pieces.

        The default takes `[:, t : t + split_size]` of every tensor that has a time dimension, and `[t : t +
        split_size]` of each sequence in a list.
        """
        return split_along_time(batch, split_size)

    # Optimization: methods to call

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Return the run's optimizer, or a list if there are several.

        Its `step` calls the hooks and the gradient scaler and counts the step. With `use_pl_optimizer=False` it is
        torch's own object.
        """
        trainer = self.trainer
        optimizers = list(trainer.handles.optimizers) if use_pl_optimizer else trainer.optimizers
        return optimizers[0] if len(optimizers) == 1 else optimizers

    def lr_schedulers(self) -> Any:
        """Return the run's scheduler, None without one, or a list if there are several."""
        schedulers = self.trainer.lr_schedulers
        if not schedulers:
            return None
        return schedulers[0] if len(schedulers) == 1 else schedulers

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass in manual optimization, instead of `loss.backward()`.

        It scales the loss, calls the hooks, and averages the gradients over the workers. Collective.
        """
        self.trainer.handles.backward(loss, *args, **kwargs)

    def clip_gradients(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip this optimizer's gradients by their total L2 norm ("norm", the default) or by element ("value")."""
        if gradient_clip_val:
            algorithm = gradient_clip_algorithm or "norm"
            self.trainer.handles.clip(optimizer, limit=gradient_clip_val, algorithm=algorithm)

    def toggle_optimizer(self, optimizer: Any) -> None:
        """Freeze the parameters of the other optimizers, until `untoggle_optimizer`."""
        self.trainer.handles.toggle(optimizer)

    def toggled_optimizer(self, optimizer: Any) -> AbstractContextManager[None]:
        """`with`: the two around it."""
        return self.trainer.handles.toggle_context(optimizer)

    def untoggle_optimizer(self, optimizer: Any) -> None:
        """Restore the parameters that `toggle_optimizer` froze."""
        self.trainer.handles.untoggle(optimizer)

    # Hyper-parameters and weights

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
        **overrides: Any,
    ) -> Self:
        """Rebuild the module with its saved hyper-parameters, and load its weights.

        Args:
            checkpoint_path: A path or a URL that fsspec knows.
            map_location: Device to which the module is moved; None: it stays where the constructor creates it.
            hparams_file: YAML or CSV file with hyper-parameters, used instead of the checkpoint's.
            strict: Require that the keys of the weights match exactly.
            weights_only: False unpickles hyper-parameters that are not plain values: only for files that you trust.
            **overrides: Arguments of the constructor, which win over the saved ones. Names that begin with an
                underscore are passed to parameters of that name, not to `**kwargs`.

        Raises:
            CheckpointError: if the file is missing, damaged or of another model.
        """
        checkpoint = read_for_rebuild(
            checkpoint_path, hparams_file=hparams_file, overrides=overrides, allow_pickle=weights_only is False
        )
        name, source = checkpoint.get("hparams_name", "kwargs"), str(checkpoint_path)
        module = rebuild(cls, checkpoint["hyper_parameters"], name, overrides=overrides, source=source)
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        load_weights(module, checkpoint["state_dict"], source=source, strict=strict)
        return module if map_location is None else module.to(map_location)

    def save_weights(self, path: str | Path) -> None:
        """Save the state dict as a safetensors file, to a path or a URL; a tied weight is stored once."""
        write_weights(self, path)

    def load_weights(self, path: str | Path, strict: bool = True) -> None:
        """Load the weights of a safetensors file, or of a checkpoint. Nothing is unpickled."""
        read_weights(self, path, strict=strict)

    def freeze(self) -> None:
        """Freeze all parameters and switch to eval mode."""
        self.requires_grad_(False)
        self.eval()

    def unfreeze(self) -> None:
        """Unfreeze all parameters and switch to train mode."""
        self.requires_grad_(True)
        self.train()

    def summarize(self, mode: Literal["top", "full"] = "top", max_depth: int | None = None) -> Summary:
        """Return a printable summary of layers and parameters.

        Args:
            mode: "top" lists the direct submodules, "full" all.
            max_depth: Depth of the listed layers, -1 for all; wins over `mode`.
        """
        return summarize(self, max_depth={"top": 1, "full": -1}[mode] if max_depth is None else max_depth)

    def to_onnx(self, file_path: Any = None, input_sample: Any = None, **options: Any) -> Any:
        """Export to ONNX with torch.onnx.export, to a path or file.

        Args:
            file_path: Path or file.
            input_sample: Input to trace with; None: the `example_input_array`.
            **options: Passed to torch.onnx.export.

        Returns:
            The result of torch.onnx.export.
        """
        return export.to_onnx(self, file_path, sample=input_sample, **options)

    def to_torchscript(
        self,
        file_path: str | Path | None = None,
        method: Literal["script", "trace"] = "script",
        example_inputs: Any = None,
        **options: Any,
    ) -> Any:
        """Return `forward` as TorchScript, in eval mode.

        Args:
            file_path: Path to save it to; None: it is not saved.
            method: "script" or "trace".
            example_inputs: Input to trace with; None: the `example_input_array`.
            **options: Passed to torch.jit.script or torch.jit.trace.
        """
        return export.to_torchscript(self, file_path, method=method, example=example_inputs, **options)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name not in _OF_THE_RUN}

    __jit_unused_properties__: ClassVar[list[str]]


LightningModule.__jit_unused_properties__ = [
    name
    for kind in (HyperparametersMixin, LightningModule)
    for name, value in vars(kind).items()
    if isinstance(value, property)
]
"""Properties that TorchScript leaves out: they belong to the run, or have types that it does not support."""


def split_along_time(batch: Any, length: int) -> list[Any]:
    """Split a batch into pieces of at most `length` time steps.

    Time is dimension 1 of a tensor (batch, time, ...), and of a list of sequences the dimension of each sequence;
    everything else goes into every piece unchanged.

    Raises:
        ModuleError: if nothing has a time dimension, or their lengths differ.
    """
    parts = _split_parts(batch)
    num_steps = {steps for part in parts if (steps := _count_time_steps(part)) is not None}
    if len(num_steps) != 1:
        problem = f"its parts have {sorted(num_steps)} time steps" if num_steps else "nothing in it has time steps"
        raise ModuleError(
            f"truncated back-propagation splits a batch along time, (batch, time, ...), but {problem}: override "
            "tbptt_split_batch(batch, split_size) and return the pieces"
        )
    return [_slice_batch(batch, slice(start, start + length)) for start in range(0, num_steps.pop(), length)]


def _split_parts(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return [batch] if isinstance(batch, Tensor) else list(batch)


def _count_time_steps(part: Any) -> int | None:
    if isinstance(part, Tensor):
        return part.shape[1] if part.ndim > 1 else None
    is_list_of_sequences = isinstance(part, (list, tuple)) and part and isinstance(part[0], (Tensor, list, tuple))
    return len(part[0]) if is_list_of_sequences else None


def _slice_batch(batch: Any, steps: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[:, steps] if _count_time_steps(batch) is not None else batch
    if isinstance(batch, Mapping):
        return {key: _slice_part(part, steps) for key, part in batch.items()}
    parts = [_slice_part(part, steps) for part in batch]
    if isinstance(batch, tuple):
        return type(batch)(*parts) if is_namedtuple(batch) else tuple(parts)
    return parts


def _slice_part(part: Any, steps: slice) -> Any:
    if _count_time_steps(part) is None:
        return part
    if isinstance(part, Tensor):
        return part[:, steps]
    sequences: Sequence[Any] = part
    return [sequence[steps] for sequence in sequences]
