"""Uneven inputs: collectives of ranks that have run out of batches while others have not. Worker."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from raylit.accelerators.transfer import to_device
from raylit.compat.torch_distributed import CollectiveWatch
from raylit.errors import ModuleError
from raylit.worker.collectives import Collectives
from raylit.worker.data.batches import to_cpu
from raylit.worker.metrics import torchmetrics_adapter
from raylit.worker.view import TrainerView

PADDING = -1
"""Sample index of a batch that belongs to another rank."""


def iterate_uneven_batches(
    batches: Iterator[tuple[int, Any]], *, num_batches: float, collectives: Collectives
) -> Iterator[tuple[int, Any]]:
    """Yield (index, batch) pairs until no rank has batches left. Collective, at each pair.

    A rank without batches left gets another rank's batch with the index `PADDING`, so that all ranks run the same
    number of steps.
    """
    num_done = 0
    while True:
        index, batch = next(batches, (PADDING, None)) if num_done < num_batches else (PADDING, None)
        num_done += 1
        num_owners = sum(collectives.gather_counts(int(index != PADDING)))
        if num_owners == 0:
            return
        if num_owners < collectives.world_size:
            pairs = collectives.gather_objects((index, batch))
            if index == PADDING:
                batch = next(other for owned_index, other in pairs if owned_index != PADDING)
        yield index, batch


_MAX_WATCHED_CALLS = 16
"""Calls of an epoch that are watched until they are assumed to have no collectives.

Usual data has one uneven step in an epoch. With batches of varying sizes every step is uneven, and watching all of
them would cost too much.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class _RankStatus:
    """State of a rank in a call, as ranks exchange it."""

    is_idle: bool = False
    """Whether the rank has no samples of its own and runs no collective of another rank's call."""
    collective: str | None = None
    """Collective that the rank is about to start; None: it is in none and waits for the others."""
    answer: Any = None
    """Number that the call returned."""


class UnevenSteps:
    """Runner of the user's code in steps in which some ranks may have no samples."""

    def __init__(self, collectives: Collectives, *, module: nn.Module, view: TrainerView, device: torch.device) -> None:
        self._collectives = collectives
        self._module = module
        self._view = view
        self._device = device
        self._num_without_collectives = 0
        self.has_collectives = False
        """Whether a call on any rank has used collectives since `start`."""
        self.num_owners = 0
        """Number of ranks that had samples of their own in the last call."""

    def start(self) -> None:
        """Reset the counts at the start of an epoch or an evaluation."""
        self._num_without_collectives, self.has_collectives = 0, False

    def run(self, call: Callable[..., Any], own: tuple[Any, ...] | None, *, run_padding: Callable[..., Any]) -> Any:
        """Run `call(*own)`, with the other ranks' collectives matched by ranks without samples. Collective.

        Args:
            call: the user's function.
            own: this rank's arguments; None: it has no samples.
            run_padding: function that a rank without samples calls instead, with another rank's arguments, if
                the other ranks' calls use collectives.

        Returns:
            The result of the call. On a rank without samples the result of another rank, if that is an int.
        """
        if self._collectives.world_size == 1:
            return None if own is None else call(*own)
        status = _RankStatus(is_idle=True)
        result = None
        if own is not None:
            with CollectiveWatch(lambda collective: self._announce(collective, own)):
                result = call(*own)
            status = _RankStatus(answer=result if type(result) is int else None)
        statuses, padding = self._exchange(status, None)
        self.num_owners = sum(not one.is_idle for one in statuses)
        while padding is not None:
            self._run_padding(run_padding, padding)
            statuses, padding = self._exchange(status, None)
        if not self.has_collectives:
            self._num_without_collectives += 1
        return result if own is not None else next((one.answer for one in statuses if one.answer is not None), None)

    def run_unless_known(
        self, call: Callable[..., Any], own: tuple[Any, ...] | None, *, run_padding: Callable[..., Any]
    ) -> Any:
        """Call `run`, or `call` directly after enough calls without collectives."""
        if self._num_without_collectives < _MAX_WATCHED_CALLS:
            return self.run(call, own, run_padding=run_padding)
        return None if own is None else call(*own)

    def wrap_hook(self, hook: Callable[..., Any], *, is_answer_needed: bool = False) -> Callable[..., Any]:
        """Return a hook of training batches that copes with ranks without a batch.

        The hook's last arguments are the batch and its index. For a batch of None it is called only if the other
        ranks wait for its collectives. With `is_answer_needed` this rank gets the result of other ranks.
        """
        run = self.run if is_answer_needed else self.run_unless_known

        def call(*args: Any) -> Any:
            return run(hook, None if args[-2] is None else args, run_padding=hook)

        return call

    def _run_padding(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Run another rank's call and restore metrics and buffers afterwards."""
        is_first = True

        def announce(collective: str) -> None:
            nonlocal is_first
            if not is_first:
                self._announce(collective, args)
            is_first = False

        with _preserve_results(self._module, self._view), CollectiveWatch(announce):
            call(*args)

    def _announce(self, collective: str, args: tuple[Any, ...]) -> None:
        """Tell the other ranks of a collective that the user's code is about to start."""
        self._exchange(_RankStatus(collective=collective), args)

    def _exchange(
        self, own: _RankStatus, args: tuple[Any, ...] | None
    ) -> tuple[list[_RankStatus], tuple[Any, ...] | None]:
        """Return the status of every rank and, on an idle rank while others start a collective, their arguments."""
        statuses: list[_RankStatus] = self._collectives.gather_objects(own)
        callers = [rank for rank, one in enumerate(statuses) if one.collective is not None]
        if not callers:
            return statuses, None
        self.has_collectives = True
        _check_same_collective(statuses)
        if not any(one.is_idle for one in statuses):
            return statuses, None
        all_args = self._collectives.gather_objects(to_cpu(args) if self._collectives.rank == callers[0] else None)
        return statuses, to_device(all_args[callers[0]], self._device) if own.is_idle else None


@contextmanager
def _preserve_results(module: nn.Module, view: TrainerView) -> Iterator[None]:
    """Drop what a call with another rank's samples logs and adds to the module's metrics and buffers."""
    metrics = view.metrics
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    was_suspended = metrics is not None and metrics.is_suspended
    if metrics is not None:
        metrics.is_suspended = True
    try:
        with torchmetrics_adapter.preserve_state(module):
            yield
    finally:
        if metrics is not None:
            metrics.is_suspended = was_suspended
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _check_same_collective(statuses: list[_RankStatus]) -> None:
    """Check that all busy ranks are in the same collective.

    Raises:
        ModuleError: they are not and would wait for each other; raised on all ranks.
    """
    busy = [replace(one, answer=None) for one in statuses if not one.is_idle]
    if len({one.collective for one in busy}) == 1:
        return
    places = [
        f"rank {rank} is in {one.collective}" if one.collective is not None else f"rank {rank} has come to the end"
        for rank, one in enumerate(statuses)
        if not one.is_idle
    ]
    names = {(one.collective or "").partition(" ")[0] for one in busy}
    advice = "every rank has to call the same collectives in the same order"
    if len(names) == 1:
        advice = (
            "tensors have to have one shape on all ranks, and at the end of the data some have fewer samples than "
            "others: use self.all_gather, which fills up what is short, gather sums and counts in place of samples, or "
            "give the loader drop_last=True"
        )
    raise ModuleError(f"the workers' collectives do not fit together: {'; '.join(places)}. In steps and hooks {advice}")
