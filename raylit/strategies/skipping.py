"""A rank that skips its batch takes its part in what the others wait for, unit by unit. Worker; where FSDP shards."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from raylit.strategies.base import Skipped, TrainingStep

_END = 2**31 - 1
"""Announced after the last unit of a forward pass."""


@dataclass(slots=True)
class _Use:
    unit: int
    is_differentiated: bool
    """Some input of it needs a gradient: torch reduces the unit's gradients in the midst of the backward pass."""
    is_reached: bool
    """The backward pass comes through it."""


class Course:
    """In which order a training step runs the units of a model.

    It is learned in the first step: ranks then tell each other before each unit, as one that skips the batch cannot
    know. From there on a rank that skips runs the collectives of what it has not run, without the computations. Names
    of torch's that begin with an underscore are private to torch 2.13.
    """

    def __init__(self, root: Any, *, replicated: Sequence[nn.Parameter], device: torch.device) -> None:
        self._root = root
        self._replicated = replicated
        self._device = device
        self._units: list[Any] = [
            part for part in root.modules() if part is not root and isinstance(part, FSDPModule) and _groups_of(part)
        ]
        self._contained = [set(unit.modules()) - {unit} for unit in self._units]
        self._uses: list[_Use] = []
        self._is_known = False
        """To every rank."""
        self._is_seen = False
        """A step of this rank's own has shown the backward pass too."""

    def run(self, step: TrainingStep, *args: Any) -> Any:
        """What the step returns; in the place of None a loss whose gradients are zero. Collective."""
        order = _order_of(self._root)
        start, watched = len(order), self._uses
        if self._is_seen:
            outputs = step(*args)
        else:
            watched = []
            with self._watching(watched):
                outputs = step(*args)
        if outputs is None:
            if self._is_known:
                self._follow(num_done=sum(not _is_of(group, self._root) for group in order[start:]))
            else:
                self._uses = watched
                self._follow_announced()
            return self._skipped()
        if not self._is_known:
            self._announce(_END)
            self._is_known = True
        if not self._is_seen:
            self._is_seen, self._uses = True, watched
            for use in watched:
                use.is_reached = False  # until it is
        return outputs

    @contextmanager
    def _watching(self, uses: list[_Use]) -> Iterator[None]:
        """The units that run meanwhile are noted, and announced as long as their order is not known."""
        hooks = []
        for index, unit in enumerate(self._units):
            begin = partial(self._note_begin, uses, index)
            hooks.append(unit.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
            hooks.append(unit.register_forward_hook(partial(_note_reached, uses, index)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note_begin(self, uses: list[_Use], index: int, unit: nn.Module, args: Any, kwargs: Any) -> None:
        is_differentiated = torch.is_grad_enabled() and any(True for _ in _needing_gradient((args, kwargs)))
        uses.append(self._use(index, is_differentiated=is_differentiated))
        if not self._is_known:
            self._announce(2 * index + 1 + is_differentiated)

    def _use(self, index: int, *, is_differentiated: bool) -> _Use:
        is_trained = any(one.sharded_param.requires_grad for one in _parameters_of(self._units[index]))
        return _Use(index, is_differentiated, is_reached=is_differentiated or is_trained)

    def _follow_announced(self) -> None:
        running: list[_Use] = []
        while (announced := self._announce(0)) not in (0, _END):
            use = self._use((announced - 1) // 2, is_differentiated=announced % 2 == 0)
            self._uses.append(use)
            for ended in self._left_for(use, running):
                self._pass_forward(ended, is_begin=False)
            self._pass_forward(use, is_begin=True)
            running.append(use)
        for ended in reversed(running):
            self._pass_forward(ended, is_begin=False)
        self._is_known = announced == _END

    def _announce(self, code: int) -> int:
        """What the ranks that run the step are at; 0 is a rank's that does not. Collective."""
        furthest = torch.tensor(code, dtype=torch.int64, device=self._device)
        dist.all_reduce(furthest, op=dist.ReduceOp.MAX)
        return int(furthest)

    def _follow(self, *, num_done: int) -> None:
        """Beginnings and ends of units after the first so many ends."""
        for use, is_begin in self._passes():
            if num_done == 0:
                self._pass_forward(use, is_begin=is_begin)
            elif not is_begin:
                num_done -= 1

    def _passes(self) -> list[tuple[_Use, bool]]:
        passes: list[tuple[_Use, bool]] = []
        running: list[_Use] = []
        for use in self._uses:
            passes += [(ended, False) for ended in self._left_for(use, running)]
            passes.append((use, True))
            running.append(use)
        return passes + [(ended, False) for ended in reversed(running)]

    def _left_for(self, use: _Use, running: list[_Use]) -> Iterator[_Use]:
        """The units that have ended when this one begins: those that it is not inside of."""
        while running and self._units[use.unit] not in self._contained[running[-1].unit]:
            yield running.pop()

    def _pass_forward(self, use: _Use, *, is_begin: bool) -> None:
        unit = self._units[use.unit]
        state = unit._get_fsdp_state()
        if is_begin:
            state._pre_forward(unit, (), {})
        else:
            state._post_forward(unit, (), None)

    def _skipped(self) -> Skipped:
        anchor = torch.zeros((), device=self._device, requires_grad=True)
        loss = _NoGradients.apply(anchor, partial(self._pass_backward, self._passes(), self._used()))
        return Skipped(loss=loss)

    def _used(self) -> Callable[[nn.Parameter], bool]:
        """Which parameters the others' losses depend on: those that have a gradient of the step before, if any has."""
        parameters = [one.sharded_param for part in (self._root, *self._units) for one in _parameters_of(part)]
        parameters += self._replicated
        # Another optimizer's, which are frozen now, may have one too.
        graded = {id(one) for one in parameters if one.requires_grad and one.grad is not None}
        return lambda parameter: not graded or id(parameter) in graded

    def _pass_backward(
        self, passes: Sequence[tuple[_Use, bool]], is_used: Callable[[nn.Parameter], bool], gradient: Tensor
    ) -> None:
        self._root._get_fsdp_state()._pre_backward(gradient)
        reached = [one for one in passes if one[0].is_reached]
        num_left = Counter(use.unit for use, is_begin in reached if is_begin)
        for use, is_begin in reversed(reached):
            unit = self._units[use.unit]
            if not is_begin:
                unit._get_fsdp_state()._pre_backward(gradient)
                continue
            num_left[use.unit] -= 1
            for group in _groups_of(unit):
                if num_left[use.unit] == 0:  # autograd adds up the gradients of all uses before anybody sees them
                    _set_zero(group, is_used)
                if use.is_differentiated:
                    group.post_backward()
        for group in _groups_of(self._root):
            _set_zero(group, is_used)
        for parameter in self._replicated:
            if parameter.requires_grad and parameter.grad is None and is_used(parameter):
                parameter.grad = torch.zeros_like(parameter)


class _NoGradients(torch.autograd.Function):
    """A loss of zero whose backward pass is the given function of its gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        ctx.run = backward
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.run(gradient)
        return None, None


def _groups_of(unit: Any) -> list[Any]:
    groups: list[Any] = unit._get_fsdp_state()._fsdp_param_groups
    return groups


def _parameters_of(unit: Any) -> list[Any]:
    return [one for group in _groups_of(unit) for one in group.fsdp_params]


def _order_of(root: Any) -> list[Any]:
    order: list[Any] = root._get_fsdp_state()._comm_ctx.post_forward_order
    return order


def _is_of(group: Any, unit: nn.Module) -> bool:
    return unit in group.modules


def _note_reached(uses: list[_Use], index: int, unit: nn.Module, args: Any, output: Any) -> None:
    use = next(one for one in reversed(uses) if one.unit == index)
    for tensor in _needing_gradient(output):
        tensor.register_hook(partial(_note_gradient, use))


def _note_gradient(use: _Use, gradient: Tensor) -> None:
    use.is_reached = True


def _needing_gradient(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.requires_grad:
            yield values
    elif isinstance(values, dict):
        yield from _needing_gradient(tuple(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _needing_gradient(value)


def _set_zero(group: Any, is_used: Callable[[nn.Parameter], bool]) -> None:
    for one in group.fsdp_params:
        own = one.unsharded_param
        if own.requires_grad and own.grad is None and one.unsharded_accumulated_grad is None:
            own.grad = torch.zeros_like(own) if is_used(one.sharded_param) else None
