"""Messages between driver and workers: commands down, reports up. Frozen, of plain values and CPU tensors."""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raylit.protocol.process_settings import TorchSettings
from raylit.protocol.state import Progress, Stage
from raylit.protocol.summary import Summary

# Tensors in messages


class TensorMessage:
    """Base of messages with tensors: pickled as arrays, they travel through Ray's object store without a copy.

    The tensors of an unpickled message are views of memory shared with other processes: copy from them, never write to
    them.
    """

    __slots__ = ()

    def __reduce__(self) -> Any:
        return _rebuild_message, (type(self), pack(_list_fields(self)))


def pack(value: Any) -> Any:
    """Return the value with the plain CPU tensors in its dicts, lists and tuples as arrays, for `unpack`."""
    return _map_tensors(value, _PackedTensor.from_tensor)


def unpack(value: Any) -> Any:
    """Return what was packed; its tensors are views of the arrays' memory."""
    return _map_leaves(value, lambda leaf: leaf.view() if isinstance(leaf, _PackedTensor) else leaf)


_Value = TypeVar("_Value")


def copy_tensors(value: _Value) -> _Value:
    """Return a message, or nested dicts, lists and tuples, with copies of the plain CPU tensors in it."""
    if isinstance(value, TensorMessage):
        return _rebuild_message(type(value), copy_tensors(_list_fields(value)))
    copy: _Value = _map_tensors(value, Tensor.clone)
    return copy


@dataclass(frozen=True, slots=True)
class _PackedTensor:
    """Bytes of a dense CPU tensor."""

    data: NDArray[np.uint8]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "_PackedTensor":
        contiguous = tensor.contiguous()
        return cls(contiguous.reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape))

    def view(self) -> Tensor:
        if self.data.flags.writeable:
            return torch.from_numpy(self.data).view(self.dtype).reshape(self.shape)
        with warnings.catch_warnings():
            # torch warns once of memory that it cannot mark as read-only; no code of raylit writes to it.
            warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")
            return torch.from_numpy(self.data).view(self.dtype).reshape(self.shape)


def _rebuild_message(kind: Any, fields: dict[str, Any]) -> Any:
    return kind(**unpack(fields))


def _list_fields(message: Any) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}


def _map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply the function to each dense CPU tensor that is neither of a subclass nor part of a graph."""

    def apply(leaf: Any) -> Any:
        is_plain = type(leaf) is Tensor and leaf.device.type == "cpu" and leaf.layout is torch.strided
        return function(leaf) if is_plain and not leaf.requires_grad else leaf

    return _map_leaves(value, apply)


_PLAIN_TYPES = frozenset({bool, bytes, float, int, str, type(None)})


def _map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
        copy = value.copy()
        for key, item in value.items():
            copy[key] = _map_leaves(item, function)
        return copy
    if type(value) in (list, tuple):
        if _PLAIN_TYPES.issuperset(map(type, value)):  # Python's random state is 625 numbers
            return type(value)(value)
        return type(value)(_map_leaves(item, function) for item in value)
    return function(value)


# Commands


@dataclass(frozen=True, kw_only=True, slots=True)
class Start(TensorMessage):
    """Command to prepare a stage: data, setup, optimizers, loaders, checkpoint. Answered by `Started`."""

    stage: Stage
    checkpoint: dict[str, Any] | None = None
    is_resuming: bool = False
    """True: continue the checkpoint's run; False: load its weights only."""
    progress: Progress = field(default_factory=Progress)
    """Before an evaluation, the progress of the previous fit."""
    random_state: dict[str, Any] | None = None
    """States of the driver's generators, from which the workers continue; None in the driver's own process."""
    torch_settings: TorchSettings | None = None
    """The driver's settings, which the workers apply; None in the driver's own process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reload:
    """Command to call the loader hooks again for the epoch that begins. Answered by `Reloaded`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HookedCommand:
    """Base of a fit's commands in whose hooks the user may save a checkpoint."""

    callback_states: bytes | None = None
    """Pickled states of the driver's callbacks by state key, for such a checkpoint; None if unchanged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Train(HookedCommand):
    """Command to train until the epoch has `until_batch` batches, `until_step` is reached or the data ends.

    Answered by `Ticked`, `Measured` and `Stepped` during the training, and `Paused` at its end.
    """

    until_batch: float
    until_step: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LookAhead(HookedCommand):
    """Command to find out whether an epoch of unknown length has another batch. Answered by `Paused`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EndEpoch(HookedCommand):
    """Command to run the epoch's last hooks and, if it is complete, its schedulers. Answered by `EpochEnded`."""

    is_complete: bool = True
    """All of the epoch's batches are done; else the run ends inside the epoch, and its checkpoints continue there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate(HookedCommand):
    """Command to run the validation or test loop over the workers' shares. Answered by `Ticked` and `Evaluated`."""

    stage: Stage
    is_sanity_check: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Predict:
    """Command to run the prediction loop. Answered by `Ticked`, and one `Predicted` from each rank."""

    is_returning: bool = True
    """Send the outputs to the driver."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Save(TensorMessage):
    """Command to capture the current state. Answered by one `Saved` from each rank.

    Rank 0 holds the checkpoint ready to be written, the other ranks send their own state. For sharded checkpoints each
    rank holds its own part.
    """

    is_weights_only: bool = False
    is_copying: bool = False
    """Copy the state, because training continues while it is written."""
    driver_part: dict[str, Any] = field(default_factory=dict)
    """The driver's entries of the checkpoint, in plain values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish(HookedCommand):
    """Command to run the last hooks, return the module and end the stage. Rank 0 answers with `Finished`."""

    interruption: Literal["SIGINT", "SIGTERM", "SIGHUP"] | None = None
    """Signal to the driver that ends the run early."""


Command = Start | Reload | Train | LookAhead | EndEpoch | Evaluate | Predict | Save | Finish


# Reports


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One reduced value, with the options of its `self.log` call."""

    value: float
    prog_bar: bool = False
    logger: bool = True
    is_alias: bool = False
    """The plain name of a metric that is logged as `x_step` and `x_epoch`; only callbacks see it."""


Metrics = dict[str, Metric]
"""Metrics by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """Report that the stage is ready. Sizes are batches per worker after limits; infinite if unknown."""

    progress: Progress
    num_training_batches: float = 0
    num_batches_in_epoch: float = 0
    """Size of the current training epoch, which other workers may have begun; else of the next epoch."""
    num_eval_batches: tuple[float, ...] = ()
    """Size of each validation, test or predict loader."""
    summary: Summary | None = None
    """Rank 0's summary of the model, if the plan requests one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reloaded:
    """Report of the new loaders' sizes, as in `Started`."""

    num_training_batches: float
    num_eval_batches: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticked:
    """Report of rank 0's position in the current loop and its own latest values, for the progress bar; not reduced."""

    batch: int
    """Number of batches finished in this epoch or loader."""
    dataloader_idx: int = 0
    metrics: dict[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped:
    """Report of a logging step's metrics, reduced over the ranks."""

    progress: Progress
    metrics: Metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTimes:
    """Times of one rank in an interval between two logging steps, in seconds of the host."""

    elapsed_s: float
    """From the end of the last reading of metrics to the beginning of this one."""
    data_wait_s: float
    """Seconds of waiting for batches."""
    backward_s: float
    """Seconds of backward passes of automatic optimization, in which the ranks wait for each other's gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Report of how all ranks have spent an interval between two logging steps. Only rank 0's reaches the driver."""

    ranks: tuple[RankTimes, ...]
    num_steps: int = 1
    """Accumulation windows in the interval."""
    num_samples: int = 0
    """Samples of this rank in the interval, if all its batches are as large as the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Paused:
    """Report that training has paused between two batches."""

    progress: Progress
    is_epoch_finished: bool
    """The epoch has no further batch."""
    stop_reason: str | None = None
    """Set if a worker's callback or hook requested the end of training."""
    metrics: Metrics = field(default_factory=dict)
    data_wait_s: float = 0.0
    """Seconds in which this rank has waited for batches during the command, moving them to the device included."""
    compilation_s: float = 0.0
    """Seconds in which this rank has compiled during the command."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochEnded:
    """Report that the epoch's last hooks have run, with the epoch's metrics, reduced over the ranks."""

    progress: Progress
    metrics: Metrics
    stop_reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Raised:
    """Report of a fit's progress when an exception ended the command. The exception itself follows."""

    progress: Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """Report of a finished evaluation, exact over all ranks."""

    stage: Stage
    metrics: Metrics
    per_loader: tuple[dict[str, float], ...] = ()
    """For each loader the values that `validate` and `test` return and print."""
    stop_reason: str | None = None
    is_broken_off: bool = False
    """The run is being interrupted: there are no metrics."""
    steps: tuple[tuple[int, Metrics], ...] = ()
    """Values logged `on_step`, one item per batch, with the number of batches that its loader gave before it.

    That number counts all evaluations of this stage.
    """
    compilation_s: float = 0.0
    """Seconds in which this rank has compiled during the command."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written(TensorMessage):
    """Report of a rank's rows for files of predictions."""

    files: dict[str, tuple[tuple[int, int, dict[str, Any]], ...]]
    """For each file and batch (dataloader_idx, index in the data set, columns); a column has one value per sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted(TensorMessage):
    """Report of a rank's predictions: for each loader, its batches' outputs with each batch's index in the data set."""

    rank: int
    outputs: tuple[tuple[tuple[int, Any], ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved(TensorMessage):
    """Report of a rank's part of a checkpoint, in plain values and CPU tensors."""

    rank: int
    checkpoint: dict[str, Any]
    """The whole run without the driver's part; empty on other ranks than 0, and when sent between processes."""
    of_rank: dict[str, Any]
    """State that only this rank has: random state, metric buffers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Shard of a tensor in a rank's file."""

    name: str
    """Name of the tensor in the checkpoint."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    dtype: torch.dtype
    offsets: tuple[int, ...]
    """Position of the shard's first element in the whole tensor."""
    sizes: tuple[int, ...]
    """Shape of the shard."""
    start: int
    """Position in the file, in bytes."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A rank's file in a sharded checkpoint."""

    rank: int
    num_bytes: int
    crc: int
    """CRC-32 of the file."""
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights(TensorMessage):
    """Report of a piece of sharded weights, gathered at the end of a run. Sent by rank 0.

    Rank 0 gathers the next piece only after the driver has received this one.
    """

    state_dict: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished(TensorMessage):
    """Report of rank 0's final module and callbacks; empty if they are the driver's own objects."""

    state_dict: dict[str, Any] = field(default_factory=dict)
    attributes: bytes = b""
    """cloudpickle of result_sync's Attributes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogCall:
    """Report of a call that a hook made on a logger, which the driver repeats. Sent by rank 0 only."""

    logger: int
    path: tuple[str, ...]
    """Attribute names from the logger to the method, which is the last one."""
    arguments: bytes
    """Positional and keyword arguments as they were at the time of the call, serialized by the worker."""
    place: str
    """The line, the hook and the step, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """Measurement of a profiled action."""

    name: str
    num_calls: int
    total_s: float
    """Seconds without those of the actions inside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Findings of a profiler in one process; of the workers, only the slowest and the fastest rank send theirs."""

    title: str
    rank: int | None
    """Rank of the worker; None for the driver."""
    elapsed_s: float
    actions: tuple[Action, ...]
    peak_memory_bytes: tuple[tuple[str, int], ...] = ()
    """Kind of memory (main memory or a device) and its peak."""
    text: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """Contents of files by the ends of their names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandDone:
    """Message that a worker has finished its command and waits for the next one."""

    rank: int
    leftovers: tuple[str, ...] = ()
    """Descriptions of what the end of a run could not clean up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """Message that an exception ended the worker's command."""

    rank: int
    host: str
    traceback: str
    """The formatted traceback without the frames of raylit and Ray."""
    summary: str
    """Last line of the traceback: type and message."""
    is_consequence: bool
    """The exception was probably caused by the loss of another rank."""
    is_harmless: bool
    """The process is intact and may be used for another run."""
    error: bytes | None
    """cloudpickle of the exception; None if it cannot be pickled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Printed:
    """Message with the lines that a worker process has printed, each with its stream."""

    lines: tuple[tuple[Literal["stdout", "stderr"], str], ...]


Report = (
    Started
    | Reloaded
    | Ticked
    | Stepped
    | Measured
    | Paused
    | EpochEnded
    | Raised
    | Evaluated
    | Written
    | Predicted
    | Saved
    | Weights
    | LogCall
    | Profile
    | Finished
)

ActorMessage = Report | CommandDone | Failed | Printed
"""Everything that an actor streams to the driver."""
