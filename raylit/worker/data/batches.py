"""Batches on their way to the step: timed, looked ahead at, moved to the device. Worker."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import torch

from raylit.accelerators import Accelerator
from raylit.accelerators.transfer import BatchForm, map_tensors
from raylit.core.datamodule import DataModule
from raylit.core.module import LightningModule
from raylit.profilers.base import Profiler, time_items
from raylit.worker.data.agreement import Description
from raylit.worker.data.sampling import Feed
from raylit.worker.loops.hooks import is_overridden, num_positional


def get_batch_size(batch: Any) -> int:
    """Return the first dimension of the batch's first tensor; 1 where it has none or there is no tensor."""
    size = _first_dimension(batch)
    return 1 if size is None else size


def _first_dimension(value: Any) -> int | None:
    if isinstance(value, torch.Tensor):
        return value.shape[0] if value.ndim > 0 else 1
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, range)):
        parts = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = (getattr(value, field.name) for field in dataclasses.fields(value))
    return next((size for part in parts if (size := _first_dimension(part)) is not None), None)


_END = object()
_NOTHING = object()


class AnyFeed(Protocol):
    """A Feed, or a wrapper that measures it or moves its batches to a device."""

    @property
    def weight(self) -> float: ...
    def __next__(self) -> Any: ...


class TimedFeed:
    """Feed that measures the time of fetching each batch."""

    def __init__(self, feed: Feed, profiler: Profiler, name: str) -> None:
        self._feed = feed
        self._profiler = profiler
        self._name = name
        self.weight = 1.0
        self.can_prefetch = feed.can_prefetch

    def __iter__(self) -> "TimedFeed":
        return self

    def __next__(self) -> Any:
        self._profiler.start(self._name)
        try:
            batch = next(self._feed)
        finally:
            self._profiler.stop(self._name)
        self.weight = self._feed.weight
        return batch


class PeekableFeed:
    """Feed of unknown length that can tell whether the batch just returned is the last one."""

    def __init__(self, feed: AnyFeed, *, state_of_source: Callable[..., dict[str, Any]] | None) -> None:
        """Wrap a feed.

        Args:
            feed: The feed to read.
            state_of_source: `TrainSource.state_dict` of a source whose state is one batch ahead of the training after a
                look ahead; None if the state is a position that does not depend on what has been fetched.
        """
        self.weight = 1.0
        """Weight of the batch just returned, as `Feed.weight`."""
        self.look_ahead_s = 0.0
        """Seconds in which `has_next` has fetched batches."""
        self.state_before: dict[str, Any] | None = None
        """The source's state from before it fetched a batch that has not been returned yet."""
        self._feed = feed
        self._state_of_source = state_of_source
        self._ahead: Any = _NOTHING
        self._weight_ahead = 1.0

    def __iter__(self) -> "PeekableFeed":
        return self

    def __next__(self) -> Any:
        if self._ahead is _NOTHING:
            batch = next(self._feed)
            self.weight = self._feed.weight
            return batch
        if self._ahead is _END:
            raise StopIteration
        batch, self._ahead, self.state_before = self._ahead, _NOTHING, None
        self.weight = self._weight_ahead
        return batch

    def has_next(self, *, num_done: int) -> bool:
        """Fetch the next batch, unless that has been done, and return whether there is one.

        Collective where fetching is. `num_done` counts the epoch's batches including the one just returned.
        """
        if self._ahead is _NOTHING:
            if self._state_of_source is not None:
                self.state_before = self._state_of_source(num_done=num_done)
            began_at = perf_counter()
            self._ahead = next(self._feed, _END)
            self.look_ahead_s += perf_counter() - began_at
            self._weight_ahead = self._feed.weight
        return self._ahead is not _END


class TrainSource(Protocol):
    """Source of the training loop's batches."""

    num_batches: float
    """Batches per worker and epoch; infinite if unknown."""
    has_exact_length: bool
    """True if an epoch has exactly `num_batches` batches; else its end is not known in advance."""
    has_own_state: bool
    """True if part of the state is the loader's own, which knows only how far it has been read."""

    def epoch(self, epoch: int, *, skip: int = 0) -> Feed:
        """Begin an epoch at batch `skip` and return its feed; an earlier feed ends."""
        ...

    def num_left(self, epoch: int, num_done: int) -> float:
        """Return the number of batches of an epoch after its first `num_done`, which other workers may have taken."""
        ...

    def state_dict(self, *, num_done: int) -> dict[str, Any]:
        """Return the state after the first `num_done` batches of the epoch; the loader may be further ahead."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    @property
    def is_last_batch_short(self) -> bool:
        """True if some rank will have no batch in the last step of an epoch; False where that is not known."""
        ...

    def descriptions(self) -> list[Description]:
        """Return, for each loader, the properties that must be equal on all ranks."""
        ...

    def order_fingerprint(self) -> int:
        """Return the fingerprint of the order of samples in the epoch begun last.

        Equal on ranks that draw the same order; 0 where there is nothing to compare.
        """
        ...


BatchHook = Callable[[Any, int], Any]
"""Maps (batch, dataloader_idx) to the batch."""


class Copy(Protocol):
    """Copy of a batch to the device, in two halves."""

    def start(self, batch: Any, dataloader_idx: int) -> Any:
        """Begin the copy and return what `finish` takes."""
        ...

    def finish(self, pending: Any) -> Any:
        """Return the batch, ready for the kernels that are launched from now on."""
        ...


class Mover:
    """Moves batches to the device through the user's transfer hooks."""

    def __init__(
        self, copy: Copy, *, before: BatchHook | None = None, after: BatchHook | None = None, can_prefetch: bool
    ) -> None:
        self._copy = copy
        self._before = before
        self._after = after
        self._can_prefetch = can_prefetch

    def measure_with(self, profiler: Profiler) -> None:
        """Measure the transfers from now on, under the names of the user's hooks."""
        self._copy = TimedCopy(self._copy, profiler)
        if self._before is not None:
            self._before = time_items(profiler, "on_before_batch_transfer", self._before)
        if self._after is not None:
            self._after = time_items(profiler, "on_after_batch_transfer", self._after)

    def move_batches(
        self, batches: Iterator[tuple[Any, Any]], *, dataloader_idx: int = 0, can_prefetch: bool
    ) -> Iterator[tuple[Any, Any]]:
        """Yield (note, batch) pairs with their batches on the device; a batch of None stays None.

        The copy of the next batch begins before a batch is yielded if `can_prefetch` says that fetching it has no
        effect other than on the step after it. Otherwise it begins when the batch is requested, while the device still
        works on the step before, unless that step has waited for the device.
        """
        if not (can_prefetch and self._can_prefetch):
            for note, batch in batches:
                yield note, self._finish_copy(self._start_copy(batch, dataloader_idx), dataloader_idx)
            return
        ahead = next(batches, None)
        pending_ahead = None if ahead is None else self._start_copy(ahead[1], dataloader_idx)
        while ahead is not None:
            (note, _), pending = ahead, pending_ahead
            ahead = next(batches, None)
            pending_ahead = None if ahead is None else self._start_copy(ahead[1], dataloader_idx)
            yield note, self._finish_copy(pending, dataloader_idx)

    def _start_copy(self, batch: Any, dataloader_idx: int) -> Any:
        if batch is None:
            return None
        if self._before is not None:
            batch = self._before(batch, dataloader_idx)
        return self._copy.start(batch, dataloader_idx)

    def _finish_copy(self, pending: Any, dataloader_idx: int) -> Any:
        if pending is None:
            return None
        batch = self._copy.finish(pending)
        return batch if self._after is None else self._after(batch, dataloader_idx)


class MovedFeed:
    """Feed whose batches are on the device."""

    def __init__(self, feed: Feed | TimedFeed, mover: Mover) -> None:
        self.weight = 1.0
        """Weight of the batch just returned, as `Feed.weight`."""
        self._batches = mover.move_batches(((feed.weight, batch) for batch in feed), can_prefetch=feed.can_prefetch)

    def __iter__(self) -> "MovedFeed":
        return self

    def __next__(self) -> Any:
        self.weight, batch = next(self._batches)
        return batch


class DirectCopy:
    """Copy that is made in full when it is started."""

    def __init__(self, move: BatchHook) -> None:
        self._move = move

    def start(self, batch: Any, dataloader_idx: int) -> Any:
        return self._move(batch, dataloader_idx)

    def finish(self, pending: Any) -> Any:
        return pending


class TimedCopy:
    """Copy whose start is measured by a profiler."""

    def __init__(self, copy: Copy, profiler: Profiler) -> None:
        self.start = time_items(profiler, "transfer_batch_to_device", copy.start)
        self.finish = copy.finish


class StreamCopy:
    """Copy on a separate stream of the device, concurrent with the kernels of the step.

    The host does not wait if the batch is in pinned memory (`DataLoader(pin_memory=True)`); otherwise it waits until
    its bytes are read, but not for the device.
    """

    def __init__(self, device: torch.device, form: BatchForm) -> None:
        self._device = device
        self._form = form
        self._streams: Any = torch.get_device_module(device)
        self._stream = self._streams.Stream(device)

    def start(self, batch: Any, dataloader_idx: int) -> Any:
        with self._streams.stream(self._stream):
            moved = map_tensors(batch, self._copy_tensor)
            return moved, self._stream.record_event()

    def finish(self, pending: Any) -> Any:
        moved, event = pending
        stream = self._streams.current_stream(self._device)
        stream.wait_event(event)

        def record_use(tensor: torch.Tensor) -> torch.Tensor:
            # The memory belongs to the copying stream: the allocator must not reuse it while the step reads it.
            tensor.record_stream(stream)
            return tensor

        # An object with its own `to` may hold tensors that cannot be found here, so it moves on the step's stream.
        return self._form.convert(map_tensors(moved, record_use, on_movable=lambda value: value.to(self._device)))

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        # With another dtype or layout in the same call torch would convert on the host first, into unpinned memory.
        return tensor.to(self._device, non_blocking=True)


def build_mover(
    *,
    module: LightningModule,
    datamodule: DataModule | None,
    accelerator: Accelerator,
    form: BatchForm,
    is_same_on_all_ranks: bool = False,
) -> Mover | None:
    """Build the mover of the run's batches; None where batches need neither hooks nor a transfer.

    `is_same_on_all_ranks` is that of `Accelerator.place_batch`.
    """
    device = accelerator.device()
    before, transfer, after = (
        _find_hook(name, module, datamodule)
        for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    )
    place = partial(accelerator.place_batch, is_same_on_all_ranks=is_same_on_all_ranks)
    is_hooked = before is not None or transfer is not None
    if is_hooked:
        before = _add_conversion(form, before)
        if transfer is not None:
            move = _bind_device(transfer, device)
            if accelerator.is_spmd:
                # What the user's transfer leaves whole on the device is divided.
                copy = DirectCopy(lambda batch, dataloader_idx: place(move(batch, dataloader_idx)))
                return Mover(copy, before=before, after=after, can_prefetch=False)
            copy = DirectCopy(move)
            return Mover(copy, before=before, after=after, can_prefetch=False)
    if accelerator.has_copy_streams:
        return Mover(StreamCopy(device, form), before=before, after=after, can_prefetch=not is_hooked)
    if form.is_plain and before is None and after is None and device.type == "cpu":
        return None
    copy = DirectCopy(lambda batch, dataloader_idx: form.convert(place(batch)))
    return Mover(copy, before=before, after=after, can_prefetch=False)


def to_cpu(value: Any) -> Any:
    """Detach tensors and copy them to the CPU; those on the meta device stay there. Waits for the device."""
    return map_tensors(value, _to_cpu, on_movable=lambda movable: movable.to("cpu"))


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.is_meta else tensor.detach().cpu()


def _find_hook(name: str, module: LightningModule, datamodule: DataModule | None) -> Any:
    """Return the data module's hook if it overrides it, else the module's; None where neither does."""
    is_in_module = is_overridden(name, module, LightningModule)
    if datamodule is not None and is_overridden(name, datamodule, DataModule):
        if is_in_module:
            warnings.warn(
                f"{name} is overridden in {type(module).__name__} and in {type(datamodule).__name__}: the data "
                "module's is used",
                stacklevel=2,
            )
        return getattr(datamodule, name)
    return getattr(module, name) if is_in_module else None


def _add_conversion(form: BatchForm, before: BatchHook | None) -> BatchHook | None:
    """Return a `before` hook that converts the batch first, so that hooks see the run's precision and layout."""
    if form.is_plain:
        return before

    def convert(batch: Any, dataloader_idx: int) -> Any:
        batch = form.convert(batch)
        return batch if before is None else before(batch, dataloader_idx)

    return convert


def _bind_device(transfer: Callable[..., Any], device: torch.device) -> BatchHook:
    if num_positional(transfer) < 3:
        # The signature of Lightning 0.9.
        return lambda batch, dataloader_idx: transfer(batch, device)
    return lambda batch, dataloader_idx: transfer(batch, device, dataloader_idx)
