"""Every type that crosses between driver and worker: commands down, reports up. Frozen, plain values, CPU tensors."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from raylit.protocol.process_settings import TorchSettings
from raylit.protocol.state import Progress, Stage
from raylit.protocol.summary import Summary

# Commands


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Prepare the data, set up, build optimizers and loaders for a stage, apply a checkpoint. Answered by `Started`."""

    stage: Stage
    checkpoint: dict[str, Any] | None = None
    is_resuming: bool = False
    """The checkpoint's whole run is continued; else its weights are loaded."""
    progress: Progress = field(default_factory=Progress)
    """Of the fit before an evaluation."""
    random_state: dict[str, Any] | None = None
    """The driver's generators, for the workers to continue from; None in the driver's own process."""
    torch_settings: TorchSettings | None = None
    """The driver's, for the workers to take over; None in the driver's own process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reload:
    """Have the loader hooks make new loaders for the epoch that begins. Answered by `Reloaded`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HookedCommand:
    """One of a fit, in whose hooks the user may save."""

    callback_states: bytes | None = None
    """Pickled, by state key: what the driver's callbacks keep in such a checkpoint; None: as it was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Train(HookedCommand):
    """Run training batches until the epoch has `until_batch` of them, `until_step` is reached or the data ends.

    Answered by `Ticked` and `Stepped` on the way and `Paused` at the end.
    """

    until_batch: float
    until_step: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LookAhead(HookedCommand):
    """Find out whether the epoch has another batch, where its length is not known. Answered by `Paused`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EndEpoch(HookedCommand):
    """Run the epoch's last hooks and, where it is complete, its schedulers. Answered by `EpochEnded`."""

    is_complete: bool = True
    """All of the epoch's batches are done. Else the run ends inside the epoch: its checkpoints continue there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate(HookedCommand):
    """Run the validation or test loop over the workers' shares. Answered by `Ticked` on the way and `Evaluated`."""

    stage: Stage
    is_sanity_check: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Predict:
    """Run the prediction loop. Answered by `Ticked` on the way and one `Predicted` of each rank."""

    is_returning: bool = True
    """The driver wants the outputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Save:
    """Take the state as it is now. Rank 0 holds it ready to be written, the others hand over what is theirs alone;
    where checkpoints are in parts, each rank holds its own.

    Answered by one `Saved` of each rank.
    """

    is_weights_only: bool = False
    is_copying: bool = False
    """Training goes on while it is written."""
    driver_part: dict[str, Any] = field(default_factory=dict)
    """What the driver adds to the checkpoint, in plain values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish(HookedCommand):
    """Run the last hooks, hand back the module and end the stage. Rank 0 answers with `Finished`."""

    interruption: Literal["SIGINT", "SIGTERM", "SIGHUP"] | None = None
    """The signal to the driver that ends the run before its time."""


Command = Start | Reload | Train | LookAhead | EndEpoch | Evaluate | Predict | Save | Finish


# Reports


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One value under one name, reduced over batches and ranks as its `self.log` asked."""

    value: float
    prog_bar: bool = False
    logger: bool = True
    is_alias: bool = False
    """The plain name of a metric that is logged as `x_step` and `x_epoch`; for callbacks only."""


Metrics = dict[str, Metric]


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """The stage is ready. Sizes are batches per worker, limits applied; infinite where a loader has no length."""

    progress: Progress
    num_training_batches: float = 0
    num_batches_in_epoch: float = 0
    """Of the training epoch under way, which other workers may have begun; of the next one, where there is none."""
    num_eval_batches: tuple[float, ...] = ()
    """Of each validation, test or predict loader."""
    summary: Summary | None = None
    """Rank 0's, where the plan asks for one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reloaded:
    """The sizes of the loaders from now on, as `Started` has them."""

    num_training_batches: float
    num_eval_batches: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticked:
    """Rank 0's place in the loop under way and its own latest values, for the progress bar; not reduced."""

    batch: int
    """Batches finished in this epoch or loader."""
    dataloader_idx: int = 0
    metrics: dict[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped:
    """The metrics of a logging step, reduced over the ranks."""

    progress: Progress
    metrics: Metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Paused:
    """Training stands still at a batch border."""

    progress: Progress
    is_epoch_finished: bool
    """The epoch has no further batch."""
    stop_reason: str | None = None
    """A worker's callback or hook asked for the end."""
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochEnded:
    progress: Progress
    metrics: Metrics
    stop_reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Raised:
    """Where a fit stood when an exception ended the command. The exception itself follows."""

    progress: Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """A finished evaluation, exact over all ranks."""

    stage: Stage
    metrics: Metrics
    per_loader: tuple[dict[str, float], ...] = ()
    """For each loader, what `validate` and `test` return and print."""
    stop_reason: str | None = None
    is_broken_off: bool = False
    """The run is being interrupted: there are no metrics."""
    steps: tuple[tuple[int, Metrics], ...] = ()
    """Of what was logged `on_step`: the values of each batch, under the number of batches that its loader has given
    before, in all evaluations of this stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A rank's rows for files of predictions."""

    files: dict[str, tuple[tuple[int, int, dict[str, Any]], ...]]
    """By file: (dataloader_idx, place in the data set, columns) of each batch; a column has a value per sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """A rank's predictions: for each loader, its batches' outputs with the index that each has in the data set."""

    rank: int
    outputs: tuple[tuple[tuple[int, Any], ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A rank's part of a checkpoint, in plain values and CPU tensors."""

    rank: int
    checkpoint: dict[str, Any]
    """The whole run without the driver's part; empty except on rank 0, and in what travels."""
    of_rank: dict[str, Any]
    """Random state, metric buffers: what only this rank has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """What a rank has of a sharded tensor, and where that is in the rank's file."""

    name: str
    """Of the tensor in the checkpoint."""
    shape: tuple[int, ...]
    """Of the whole."""
    dtype: torch.dtype
    offsets: tuple[int, ...]
    """Where in the whole the chunk begins."""
    sizes: tuple[int, ...]
    start: int
    """Where in the file, in bytes."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A rank's file in a checkpoint that is a directory."""

    rank: int
    num_bytes: int
    crc: int
    """CRC-32."""
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A piece of the weights that no single rank has, at the end of a run. Rank 0's, who waits with the next ones until
    the driver has taken it."""

    state_dict: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """Rank 0's module and callbacks as training and hooks left them; empty where they are the driver's own objects."""

    state_dict: dict[str, Any] = field(default_factory=dict)
    attributes: bytes = b""
    """cloudpickle of handback.Attributes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogCall:
    """A call that a hook has made on a logger, for the driver to make. Rank 0's only."""

    logger: int
    path: tuple[str, ...]
    """Attributes from the logger to the method, which is the last."""
    arguments: bytes
    """Positional and keyword arguments as they were then: `worker.snapshot`."""
    place: str
    """The line, the hook and the step, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """Something that a profiler has measured."""

    name: str
    num_calls: int
    total_s: float
    """Without what other actions inside it took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What a profiler has found in a process; of the workers, only the slowest and the fastest rank send theirs."""

    title: str
    rank: int | None
    """None: the driver."""
    elapsed_s: float
    actions: tuple[Action, ...]
    peak_memory_bytes: tuple[tuple[str, int], ...] = ()
    """Of main memory and devices, by what the memory is."""
    text: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """By the ends of their names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandDone:
    """A worker is through with what it was asked to do and waits for more."""

    rank: int
    leftovers: tuple[str, ...] = ()
    """What the end of a run could not clear away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """An exception ended the worker's command."""

    rank: int
    host: str
    traceback: str
    """As the interpreter would have printed it, without the frames that are raylit's or Ray's."""
    summary: str
    """Its last line: type and message."""
    is_consequence: bool
    """Probably only because another rank has gone."""
    is_harmless: bool
    """To the process, which may go on with another run."""
    error: bytes | None
    """cloudpickle of the exception; None where it cannot travel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Printed:
    """What a worker process has printed: whole lines, each with the stream it was written to."""

    lines: tuple[tuple[Literal["stdout", "stderr"], str], ...]


Report = (
    Started
    | Reloaded
    | Ticked
    | Stepped
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
"""What an actor streams to the driver."""
