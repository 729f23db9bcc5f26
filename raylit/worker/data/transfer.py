"""A batch's way to the device, ahead of the step where that changes nothing else, and a result's way back. Worker."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from raylit.accelerators.transfer import BatchForm, map_tensors, to_device
from raylit.core.datamodule import DataModule
from raylit.core.module import LightningModule
from raylit.profilers.base import Profiler, time_items
from raylit.worker.data.batches import Feed
from raylit.worker.loops.hooks import is_overridden, num_positional
from raylit.worker.process.profiling import TimedFeed

BatchHook = Callable[[Any, int], Any]
"""(batch, dataloader_idx) to the batch."""


class Copy(Protocol):
    """A copy to the device in two halves."""

    def start(self, batch: Any, dataloader_idx: int) -> Any:
        """Begin the copy; what `finish` takes."""
        ...

    def finish(self, started: Any) -> Any:
        """The batch, for whatever is launched from now on."""
        ...


class Mover:
    """Brings batches to the device, by way of the user's transfer hooks."""

    def __init__(
        self, copy: Copy, *, before: BatchHook | None = None, after: BatchHook | None = None, may_run_ahead: bool
    ) -> None:
        self._copy = copy
        self._before = before
        self._after = after
        self._may_run_ahead = may_run_ahead

    def be_measured(self, profiler: Profiler) -> None:
        """From now on, by the names of the user's hooks."""
        self._copy = TimedCopy(self._copy, profiler)
        if self._before is not None:
            self._before = time_items(profiler, "on_before_batch_transfer", self._before)
        if self._after is not None:
            self._after = time_items(profiler, "on_after_batch_transfer", self._after)

    def over(
        self, batches: Iterator[tuple[Any, Any]], *, dataloader_idx: int = 0, may_run_ahead: bool
    ) -> Iterator[tuple[Any, Any]]:
        """(note, batch) pairs, their batches on the device; a batch of None stays None.

        The copy of the next batch begins before a batch is handed out where that is `may_run_ahead` to the loader:
        fetching a batch has no effect that anything but the step after it could see. Else it begins when the batch is
        asked for, which is while the device still works on the step before, unless that has waited for the device.
        """
        if not (may_run_ahead and self._may_run_ahead):
            for note, batch in batches:
                yield note, self._finished(self._started(batch, dataloader_idx), dataloader_idx)
            return
        ahead = next(batches, None)
        started = None if ahead is None else self._started(ahead[1], dataloader_idx)
        while ahead is not None:
            (note, _), current = ahead, started
            ahead = next(batches, None)
            started = None if ahead is None else self._started(ahead[1], dataloader_idx)
            yield note, self._finished(current, dataloader_idx)

    def _started(self, batch: Any, dataloader_idx: int) -> Any:
        if batch is None:
            return None
        if self._before is not None:
            batch = self._before(batch, dataloader_idx)
        return self._copy.start(batch, dataloader_idx)

    def _finished(self, started: Any, dataloader_idx: int) -> Any:
        if started is None:
            return None
        batch = self._copy.finish(started)
        return batch if self._after is None else self._after(batch, dataloader_idx)


class MovedFeed:
    """A Feed whose batches are on the device."""

    __slots__ = ("_batches", "weight")

    def __init__(self, feed: Feed | TimedFeed, mover: Mover) -> None:
        self.weight = 1.0
        """Of the batch just returned, as the Feed's."""
        self._batches = mover.over(((feed.weight, batch) for batch in feed), may_run_ahead=feed.may_run_ahead)

    def __iter__(self) -> "MovedFeed":
        return self

    def __next__(self) -> Any:
        self.weight, batch = next(self._batches)
        return batch


class DirectCopy:
    """A copy that is asked for and done with where the batch is needed."""

    def __init__(self, move: BatchHook) -> None:
        self._move = move

    def start(self, batch: Any, dataloader_idx: int) -> Any:
        return self._move(batch, dataloader_idx)

    def finish(self, started: Any) -> Any:
        return started


class TimedCopy:
    """A copy that is measured where it begins."""

    def __init__(self, copy: Copy, profiler: Profiler) -> None:
        self.start = time_items(profiler, "transfer_batch_to_device", copy.start)
        self.finish = copy.finish


class StreamCopy:
    """A copy on a CUDA stream of its own, beside the kernels of the step. The host waits for nothing if the batch lies
    in pinned memory (`DataLoader(pin_memory=True)`); else for its bytes to be read, but not for the device."""

    def __init__(self, device: torch.device, form: BatchForm) -> None:
        self._device = device
        self._form = form
        self._stream: Any = torch.cuda.Stream(device)

    def start(self, batch: Any, dataloader_idx: int) -> Any:
        with torch.cuda.stream(self._stream):
            moved = map_tensors(batch, self._copied)
            return moved, self._stream.record_event()

    def finish(self, started: Any) -> Any:
        moved, event = started
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)

        def arrived(tensor: torch.Tensor) -> torch.Tensor:
            # Its memory is the copying stream's: the allocator is not to give it away while the step reads it.
            tensor.record_stream(stream)
            return tensor

        # What moves itself may hold tensors that nobody else can find, so it moves on the step's own stream.
        return self._form.of(map_tensors(moved, arrived, on_movable=lambda value: value.to(self._device)))

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        # With another type or layout in the same call torch would convert on the host first, into memory that is not
        # pinned.
        return tensor.to(self._device, non_blocking=True)


def build_mover(
    *,
    module: LightningModule,
    datamodule: DataModule | None,
    device: torch.device,
    form: BatchForm,
) -> Mover | None:
    """The way that batches take; None where they are as they should be already."""
    before, transfer, after = (
        _hook(name, module, datamodule)
        for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    )
    is_hooked = before is not None or transfer is not None
    if is_hooked:
        before = _converting(form, before)
        if transfer is not None:
            copy = DirectCopy(_with_device(transfer, device))
            return Mover(copy, before=before, after=after, may_run_ahead=False)
    if device.type == "cuda":
        return Mover(StreamCopy(device, form), before=before, after=after, may_run_ahead=not is_hooked)
    if form.is_plain and before is None and after is None:
        return None
    copy = DirectCopy(lambda batch, dataloader_idx: form.of(to_device(batch, device)))
    return Mover(copy, before=before, after=after, may_run_ahead=False)


def to_cpu(value: Any) -> Any:
    """Detached, on the CPU; what is on the meta device stays there. Waits for the device."""
    return map_tensors(value, _on_cpu, on_movable=lambda movable: movable.to("cpu"))


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.is_meta else tensor.detach().cpu()


def _hook(name: str, module: LightningModule, datamodule: DataModule | None) -> Any:
    """The data module's if it overrides it, else the module's; None where neither does."""
    is_modules = is_overridden(name, module, LightningModule)
    if datamodule is not None and is_overridden(name, datamodule, DataModule):
        if is_modules:
            warnings.warn(
                f"{name} is overridden in {type(module).__name__} and in {type(datamodule).__name__}: the data "
                "module's is used",
                stacklevel=2,
            )
        return getattr(datamodule, name)
    return getattr(module, name) if is_modules else None


def _converting(form: BatchForm, before: BatchHook | None) -> BatchHook | None:
    """The user's hooks see the batch in the run's precision and layout."""
    if form.is_plain:
        return before

    def converted(batch: Any, dataloader_idx: int) -> Any:
        batch = form.of(batch)
        return batch if before is None else before(batch, dataloader_idx)

    return converted


def _with_device(transfer: Callable[..., Any], device: torch.device) -> BatchHook:
    if num_positional(transfer) < 3:
        # As of Lightning 0.9.
        return lambda batch, dataloader_idx: transfer(batch, device)
    return lambda batch, dataloader_idx: transfer(batch, device, dataloader_idx)
