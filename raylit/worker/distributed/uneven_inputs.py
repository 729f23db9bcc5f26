"""Collectives of ranks that have run out of batches while others have not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from raylit.accelerators.transfer import to_device
from raylit.compat.torch_collectives import CollectiveWatch
from raylit.errors import ModuleError
from raylit.worker.data.transfer import to_cpu
from raylit.worker.distributed.collectives import Collectives
from raylit.worker.metrics import torchmetrics_adapter
from raylit.worker.view import TrainerView

PADDING = -1
"""The place of a batch that belongs to another rank."""


def iterate_uneven_batches(
    batches: Iterator[tuple[int, Any]], *, num_batches: float, collectives: Collectives
) -> Iterator[tuple[int, Any]]:
    """(place, batch) pairs until no rank has any left: a rank that is through gets another's batch, so that it runs
    as many steps as they do. Collective, at each pair."""
    num_done = 0
    while True:
        place, batch = next(batches, (PADDING, None)) if num_done < num_batches else (PADDING, None)
        num_done += 1
        num_owners = sum(collectives.gather_counts(int(place != PADDING)))
        if num_owners == 0:
            return
        if num_owners < collectives.world_size:
            offers = collectives.gather_objects((place, batch))
            if place == PADDING:
                batch = next(offer for owned, offer in offers if owned != PADDING)
        yield place, batch


_MAX_QUIET = 16
"""Calls of an epoch that are watched before it is taken for granted that they have no collectives. Usual data has one
uneven step in an epoch; batches of ever changing sizes make every step uneven, which are not to be watched for ever."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Message:
    """What a rank is at."""

    is_idle: bool = False
    """It has no samples of its own, and nobody has asked for it so far."""
    collective: str | None = None
    """The one that it is about to take part in; None: it is in none, and waits for the others."""
    answer: Any = None
    """A number that the call has returned."""


class UnevenSteps:
    """Runs the user's code where it is not known that all ranks have samples for it."""

    def __init__(self, collectives: Collectives, *, module: nn.Module, view: TrainerView, device: torch.device) -> None:
        self._collectives = collectives
        self._module = module
        self._view = view
        self._device = device
        self._num_quiet = 0
        self.has_collectives = False
        """Since `start`, on any rank."""
        self.num_owners = 0
        """Ranks that had samples of their own in the last call."""

    def start(self) -> None:
        """At the start of an epoch or an evaluation."""
        self._num_quiet, self.has_collectives = 0, False

    def run(self, call: Callable[..., Any], own: tuple[Any, ...] | None, *, follow: Callable[..., Any]) -> Any:
        """`call(*own)`; None for `own`: this rank has no samples. `follow` is called in its place, with another rank's
        arguments, if the others' calls come to collectives. Collective.

        Returns what the call does; for a rank without samples the others' answer, if it is an int.
        """
        if self._collectives.world_size == 1:
            return None if own is None else call(*own)
        message = _Message(is_idle=True)
        result = None
        if own is not None:
            with CollectiveWatch(lambda collective: self._meet(collective, own)):
                result = call(*own)
            message = _Message(answer=result if type(result) is int else None)
        messages, offered = self._exchange(message, None)
        self.num_owners = sum(not one.is_idle for one in messages)
        while offered is not None:
            self._follow(follow, offered)
            messages, offered = self._exchange(message, None)
        if not self.has_collectives:
            self._num_quiet += 1
        return result if own is not None else next((one.answer for one in messages if one.answer is not None), None)

    def run_unless_quiet(
        self, call: Callable[..., Any], own: tuple[Any, ...] | None, *, follow: Callable[..., Any]
    ) -> Any:
        """`run`, until enough calls have shown that they have no collectives."""
        if self._num_quiet < _MAX_QUIET:
            return self.run(call, own, follow=follow)
        return None if own is None else call(*own)

    def watched(self, hook: Callable[..., Any], *, is_answer_needed: bool = False) -> Callable[..., Any]:
        """A hook of training batches, whose last arguments are the batch and its number; for a batch of None it is
        called only if the others wait for it. `is_answer_needed`: this rank is to know what it returned on others."""
        run = self.run if is_answer_needed else self.run_unless_quiet

        def call(*args: Any) -> Any:
            return run(hook, None if args[-2] is None else args, follow=hook)

        return call

    def _follow(self, follow: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Another rank's call, which leaves no trace in what is counted here."""
        is_announced = True

        def meet(collective: str) -> None:
            nonlocal is_announced
            if not is_announced:
                self._meet(collective, args)
            is_announced = False

        with _counting_for_nothing(self._module, self._view), CollectiveWatch(meet):
            follow(*args)

    def _meet(self, collective: str, args: tuple[Any, ...]) -> None:
        """Before a collective of the user's."""
        self._exchange(_Message(collective=collective), args)

    def _exchange(self, own: _Message, args: tuple[Any, ...] | None) -> tuple[list[_Message], tuple[Any, ...] | None]:
        """What every rank is at; for those that are idle, while others come to a collective, their arguments."""
        messages: list[_Message] = self._collectives.gather_objects(own)
        callers = [rank for rank, one in enumerate(messages) if one.collective is not None]
        if not callers:
            return messages, None
        self.has_collectives = True
        _check_alike(messages)
        if not any(one.is_idle for one in messages):
            return messages, None
        offers = self._collectives.gather_objects(to_cpu(args) if self._collectives.rank == callers[0] else None)
        return messages, to_device(offers[callers[0]], self._device) if own.is_idle else None


@contextmanager
def _counting_for_nothing(module: nn.Module, view: TrainerView) -> Iterator[None]:
    """Around a call with samples of another rank's: what it logs, and what the module's metrics and buffers (running
    statistics) take in, is dropped."""
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


def _check_alike(messages: list[_Message]) -> None:
    """ModuleError, on all ranks: they would wait for each other in different collectives."""
    at_work = [replace(one, answer=None) for one in messages if not one.is_idle]
    if len({one.collective for one in at_work}) == 1:
        return
    places = [
        f"rank {rank} is in {one.collective}" if one.collective is not None else f"rank {rank} has come to the end"
        for rank, one in enumerate(messages)
        if not one.is_idle
    ]
    names = {(one.collective or "").partition(" ")[0] for one in at_work}
    advice = "every rank has to call the same collectives in the same order"
    if len(names) == 1:
        advice = (
            "tensors have to have one shape on all ranks, and at the end of the data some have fewer samples than "
            "others: use self.all_gather, which fills up what is short, gather sums and counts in place of samples, or "
            "give the loader drop_last=True"
        )
    raise ModuleError(f"the workers' collectives do not fit together: {'; '.join(places)}. In steps and hooks {advice}")
