"""The LightningModule: what a user subclasses, with every hook and its default."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from raylit.accelerators.transfer import is_namedtuple, to_device
from raylit.core import export
from raylit.core.hparams import HyperparametersMixin, load_weights, read_for_rebuild, rebuild
from raylit.core.weights import read_weights, write_weights
from raylit.errors import ConfigError, ModuleError
from raylit.protocol.summary import Summary, summarize


class LoopHooks(nn.Module):
    """In the order in which they come; every worker calls them."""

    def setup(self, stage: str) -> None:
        """Every worker, before the loaders are made. May be defined without `stage`."""

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
        """Return -1 to end the epoch here."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...
    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None: ...
    def on_before_backward(self, loss: Tensor) -> None: ...
    def on_after_backward(self) -> None: ...
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None: ...
    def on_validation_start(self) -> None: ...
    def on_validation_end(self) -> None: ...
    def on_validation_model_eval(self) -> None:
        """Before the loop: eval mode."""
        self.eval()

    def on_validation_model_train(self) -> None:
        """After the loop. Not overridden: each submodule goes back to the mode that it was in."""
        self.train()

    def on_validation_epoch_start(self) -> None: ...
    def on_validation_epoch_end(self) -> None: ...
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_start(self) -> None: ...
    def on_test_end(self) -> None: ...
    def on_test_model_eval(self) -> None:
        self.eval()

    def on_test_model_train(self) -> None:
        self.train()

    def on_test_epoch_start(self) -> None: ...
    def on_test_epoch_end(self) -> None: ...
    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_start(self) -> None: ...
    def on_predict_end(self) -> None: ...
    def on_predict_model_eval(self) -> None:
        self.eval()

    def on_predict_model_train(self) -> None:
        self.train()

    def on_predict_epoch_start(self) -> None: ...
    def on_predict_epoch_end(self) -> None: ...
    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
    def on_exception(self, exception: BaseException) -> None: ...


def split_along_time(batch: Any, length: int) -> list[Any]:
    """Pieces of at most `length` time steps. Time is dimension 1 of a tensor (batch, time, ...), and what the entries
    of a list of sequences have of it; everything else goes into every piece as it is.

    ModuleError: nothing has a time dimension, or their lengths differ.
    """
    parts = _parts(batch)
    num_steps = {steps for part in parts if (steps := _num_steps(part)) is not None}
    if len(num_steps) != 1:
        found = f"its parts have {sorted(num_steps)} time steps" if num_steps else "nothing in it has time steps"
        raise ModuleError(
            f"truncated back-propagation splits a batch along time, (batch, time, ...), but {found}: override "
            "tbptt_split_batch(batch, split_size) and return the pieces"
        )
    return [_piece(batch, slice(start, start + length)) for start in range(0, num_steps.pop(), length)]


def _parts(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return [batch] if isinstance(batch, Tensor) else list(batch)


def _num_steps(part: Any) -> int | None:
    if isinstance(part, Tensor):
        return part.shape[1] if part.ndim > 1 else None
    is_list_of_sequences = isinstance(part, (list, tuple)) and part and isinstance(part[0], (Tensor, list, tuple))
    return len(part[0]) if is_list_of_sequences else None


def _piece(batch: Any, steps: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[:, steps] if _num_steps(batch) is not None else batch
    if isinstance(batch, Mapping):
        return {key: _cut(part, steps) for key, part in batch.items()}
    parts = [_cut(part, steps) for part in batch]
    if isinstance(batch, tuple):
        return type(batch)(*parts) if is_namedtuple(batch) else tuple(parts)
    return parts


def _cut(part: Any, steps: slice) -> Any:
    if _num_steps(part) is None:
        return part
    if isinstance(part, Tensor):
        return part[:, steps]
    sequences: Sequence[Any] = part
    return [sequence[steps] for sequence in sequences]


_OF_THE_RUN = ("_view", "_metrics")
"""Attributes that belong to the worker's run under way; they are left out of copies and pickles."""


class LightningModule(HyperparametersMixin, LoopHooks):
    """Organized PyTorch: training, validation, test and prediction steps and their hooks on one nn.Module."""

    _view: Any = None
    """Raylit's own, see `trainer`: the worker's view of the run under way; None outside of runs."""
    _metrics: Any = None
    """Raylit's own: what `log` writes to; None where nothing is collected."""
    example_input_array: Any = None
    automatic_optimization: bool = True
    """False: `training_step` runs backward passes and optimizers itself (`optimizers`, `manual_backward`)."""
    truncated_bptt_steps: int | None = None
    """Length of the pieces of truncated back-propagation, as the Trainer's argument of this name."""

    # The steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """(batch, batch_idx) to the loss: a scalar tensor with a gradient, or a dict with it under `loss`."""
        raise NotImplementedError(f"{type(self).__name__} has no training_step")

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """(batch, batch_idx[, dataloader_idx]), in eval mode without gradients."""
        raise NotImplementedError(f"{type(self).__name__} has no validation_step")

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """(batch, batch_idx[, dataloader_idx]), in eval mode without gradients."""
        raise NotImplementedError(f"{type(self).__name__} has no test_step")

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """(batch, batch_idx[, dataloader_idx]) to what `predict` returns for the batch; `self(batch)` by default."""
        return self(args[0])

    def configure_optimizers(self) -> Any:
        """An optimizer; a list of them; `[optimizers], [schedulers]`; a dict with `optimizer`, `lr_scheduler` and
        `frequency`; several such dicts; or None."""
        raise NotImplementedError(f"{type(self).__name__} has no configure_optimizers")

    def configure_callbacks(self) -> Any:
        """Callbacks, one or a list, for every run of this module; each takes the place of the Trainer's of its type."""
        return []

    # Data

    def prepare_data(self) -> None:
        """One process per host, before any `setup`; state set here is lost, leave files."""

    def train_dataloader(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no train_dataloader")

    def val_dataloader(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no val_dataloader")

    def test_dataloader(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no test_dataloader")

    def predict_dataloader(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no predict_dataloader")

    # A batch's way to the device; the data module's win. What is not overridden costs nothing

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch to move, in every loop and on every device; runs when the batch is needed."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on `device`: every tensor in it, and every object with a `to` of its own."""
        return to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch for the step, on the device."""
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
        """Keep a scalar for progress bar, loggers and callbacks. Costs no communication; values are read later.

        Inside the training loop `on_step` is the default, elsewhere `on_epoch`. What is read is reduced over all the
        ranks that logged the name, by `reduce_fx` ("mean", "sum", "min", "max" or a function of the stacked values);
        an epoch's mean is weighted by `batch_size` (by default the first dimension of the batch's first tensor; with 0
        the value counts for nothing, and a mean of nothing else is nan).
        `sync_dist` is therefore always on; it is accepted, like `sync_dist_group`, for Lightning's sake.
        """
        if self._metrics is None:
            self._miss_run(name)
            return
        if rank_zero_only and self._view.global_rank != 0:
            return
        self._metrics.log(name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, batch_size, add_dataloader_idx)

    def log_dict(self, dictionary: Mapping[str, Any], **kwargs: Any) -> None:
        """`log` for each entry, of a dict or a torchmetrics.MetricCollection; keywords as there."""
        if hasattr(dictionary, "compute_groups"):
            # The members themselves: copies of their states would not be reset, nor go on.
            items = dictionary.items(keep_base=False, copy_state=False)  # type: ignore[call-arg]
        else:
            items = dictionary.items()
        for name, value in items:
            self.log(name, value, **kwargs)

    def _miss_run(self, name: str) -> None:
        if self._view is not None:
            raise ConfigError(
                f"self.log({name!r}) is called where nothing is collected: log in the hooks of batches and epochs of "
                "training, validation and test, not before or after the training, nor at the end of a whole "
                "validation or test, nor in prediction"
            )
        # Steps can be tried out by hand.
        warnings.warn(f"self.log({name!r}) does nothing: no Trainer runs this module", stacklevel=3)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print` on rank 0 only."""
        if self.global_rank == 0:
            print(*args, **kwargs)

    # The run, as this worker sees it

    def attach_run(self, view: Any) -> None:
        """Have `trainer` and what follows here show this view of a run; None: no run. Called by the worker."""
        self._view = view

    def redirect_log(self, metrics: Any) -> Any:
        """Have `log` write to this metric buffer, or nowhere; returns the one before. Called by the worker's loops."""
        before, self._metrics = self._metrics, metrics
        return before

    @property
    def trainer(self) -> Any:
        """The worker's view of the run; only inside a run."""
        if self._view is None:
            raise RuntimeError(f"{type(self).__name__} is not inside a run: `trainer` is there in hooks only")
        return self._view

    @property
    def current_epoch(self) -> int:
        return self._view.current_epoch if self._view is not None else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps so far."""
        return self._view.global_step if self._view is not None else 0

    @property
    def global_rank(self) -> int:
        return self._view.global_rank if self._view is not None else 0

    @property
    def local_rank(self) -> int:
        return self._view.local_rank if self._view is not None else 0

    @property
    def logger(self) -> Any:
        return self._view.logger if self._view is not None else None

    @property
    def loggers(self) -> list[Any]:
        return self._view.loggers if self._view is not None else []

    @property
    def device(self) -> torch.device:
        """Where the first parameter (or else buffer) lives."""
        tensor = next(iter(self.parameters()), next(iter(self.buffers()), None))
        return tensor.device if tensor is not None else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the first parameter."""
        tensor = next(iter(self.parameters()), None)
        return tensor.dtype if tensor is not None else torch.get_default_dtype()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Tensors (and numbers, in dicts and lists too) of every rank, stacked in a new first dimension; as they are
        where there is one rank. `sync_grads`: gradients flow back to each rank. Collective."""
        return data if self._view is None else self._view.all_gather(data, group=group, sync_grads=sync_grads)

    def get_progress_bar_dict(self) -> dict[str, Any]:
        """What rank 0 sends to the progress bar while it trains: numbers and texts. Override it to add some."""
        return {} if self._metrics is None else dict(self._metrics.latest(only_prog_bar=True))

    # Optimization: what may be overridden

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The backward pass, of automatic optimization and of `manual_backward`."""
        loss.backward(*args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """At the end of each window. `optimizer_closure` runs `training_step` and the backward pass and returns the
        loss: whoever overrides this calls it, by `optimizer.step(closure=optimizer_closure)` or directly."""
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Before each step of automatic optimization, with the Trainer's arguments."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: float | None) -> None:
        """`metric`: the value that a ReduceLROnPlateau follows, else None."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def tbptt_split_batch(self, batch: Any, split_size: int) -> list[Any]:
        """The pieces of a batch for truncated back-propagation: `[:, t : t + split_size]` of every tensor that has a
        time dimension; of a list, of each of its sequences."""
        return split_along_time(batch, split_size)

    # Optimization: what may be called

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The run's optimizer; a list where there are several. Its `step` runs hooks and the gradient scaler and counts
        the step; without `use_pl_optimizer` it is torch's own object."""
        trainer = self.trainer
        optimizers = list(trainer.handles.optimizers) if use_pl_optimizer else trainer.optimizers
        return optimizers[0] if len(optimizers) == 1 else optimizers

    def lr_schedulers(self) -> Any:
        """The run's scheduler, None without one; a list where there are several."""
        schedulers = self.trainer.lr_schedulers
        if not schedulers:
            return None
        return schedulers[0] if len(schedulers) == 1 else schedulers

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """In manual optimization instead of `loss.backward()`: scales the loss, runs the hooks, and averages the
        gradients over the workers."""
        self.trainer.handles.backward(loss, *args, **kwargs)

    def clip_gradients(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip this optimizer's gradients: by their total L2 norm ("norm", the default) or each element ("value")."""
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
        self.trainer.handles.untoggle(optimizer)

    # Hyper-parameters, weights

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
        """Rebuild the module with its saved hyper-parameters (`overrides` win) and load its weights.

        A path or a URL that fsspec knows. `hparams_file`: YAML or CSV, taken instead of what the checkpoint has.
        `weights_only=False` unpickles hyper-parameters that are not plain values: for files you trust. Names that begin
        with an underscore go to parameters of that name, not to `**kwargs`. CheckpointError: the file is missing,
        damaged or of another model.
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
        """The state dict as a safetensors file, to a path or a URL; a tied weight is stored once."""
        write_weights(self, path)

    def load_weights(self, path: str | Path, strict: bool = True) -> None:
        """Take over the weights of a safetensors file, or of a checkpoint. Nothing is unpickled."""
        read_weights(self, path, strict=strict)

    def freeze(self) -> None:
        """No gradients, eval mode."""
        self.requires_grad_(False)
        self.eval()

    def unfreeze(self) -> None:
        self.requires_grad_(True)
        self.train()

    def summarize(self, mode: Literal["top", "full"] = "top", max_depth: int | None = None) -> Summary:
        """Layers and parameters, to be printed; `max_depth` (-1: all layers) says more than `mode`."""
        return summarize(self, max_depth={"top": 1, "full": -1}[mode] if max_depth is None else max_depth)

    def to_onnx(self, file_path: Any = None, input_sample: Any = None, **options: Any) -> Any:
        """torch.onnx.export to a path or file, with `input_sample` or the `example_input_array`; `options` go there."""
        return export.to_onnx(self, file_path, sample=input_sample, **options)

    def to_torchscript(
        self,
        file_path: str | Path | None = None,
        method: Literal["script", "trace"] = "script",
        example_inputs: Any = None,
        **options: Any,
    ) -> Any:
        """TorchScript of `forward` in eval mode; "trace" runs `example_inputs` or the `example_input_array`."""
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
"""Scripting leaves them out: they belong to the run, or are nothing that TorchScript has a type for."""
