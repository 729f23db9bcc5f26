"""A rank that skips its batch takes its part in what the others wait for, unit by unit. Worker; where FSDP shards."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from raylit.compat.torch_fsdp import (
    get_forward_order,
    get_state,
    list_param_groups,
    list_sharded_parameters,
    run_post_forward,
    run_pre_backward,
    run_pre_forward,
)
from raylit.strategies.base import TrainingStep, ZeroLoss

_END = 2**31 - 1
"""Announced after the last unit of a forward pass."""


@dataclass(slots=True)
class _Use:
    unit: int
    is_differentiated: bool
    """Some input of it needs a gradient: torch reduces the unit's gradients in the midst of the backward pass."""
    is_reached: bool = True
    """The backward pass comes through it."""


class CollectiveSchedule:
    """In which order a training step runs the units of a model, and which of them its loss depends on.

    It is learned in the first step: ranks then tell each other before each unit, as one that skips the batch cannot
    know. From there on a rank that skips runs the collectives of what it has not run, without the computations.
    """

    def __init__(self, root: Any, *, replicated: Sequence[nn.Parameter], device: torch.device) -> None:
        self._root = root
        self._replicated = replicated
        self._device = device
        self._units: list[Any] = [
            part for part in root.modules() if part is not root and isinstance(part, FSDPModule) and _groups_of(part)
        ]
        self._contained = [set(unit.modules()) - {unit} for unit in self._units]
        self._sharded = [one for part in (root, *self._units) for one in list_sharded_parameters(get_state(part))]
        self._uses: list[_Use] = []
        self._unused: set[int] = set()
        """Parameters that the loss does not depend on, by `id`: sharded or replicated ones."""
        self._is_known = False

    def run(self, step: TrainingStep, *args: Any) -> Any:
        """What the step returns; in the place of None a loss whose gradients are zero. Collective."""
        if not self._is_known:
            return self._run_learning(step, *args)
        order = get_forward_order(get_state(self._root))
        start = len(order)
        outputs = step(*args)
        if outputs is not None:
            return outputs
        self._follow(num_done=sum(self._root not in group.modules for group in order[start:]))
        return self._skipped()

    def _run_learning(self, step: TrainingStep, *args: Any) -> Any:
        self._uses, self._unused = [], set()
        ends: list[list[Any]] = []
        """Of each use, the graph's nodes that it has ended in."""
        hooks = []
        for index, unit in enumerate(self._units):
            begin = partial(self._announce_own, index, ends)
            hooks.append(unit.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
            hooks.append(unit.register_forward_hook(partial(self._note_ends, index, ends)))
        try:
            outputs = step(*args)
        finally:
            for hook in hooks:
                hook.remove()
        if outputs is not None:
            self._announce(_END)
            self._is_known = True
        else:
            self._follow_announced()
        if self._is_known:
            self._agree(_nodes_below(outputs), ends)
        return self._skipped() if outputs is None else outputs

    def _announce_own(self, index: int, ends: list[list[Any]], unit: nn.Module, args: Any, kwargs: Any) -> None:
        is_differentiated = torch.is_grad_enabled() and any(True for _ in _needing_gradient((args, kwargs)))
        self._uses.append(_Use(index, is_differentiated))
        ends.append([])
        self._announce(2 * index + 1 + is_differentiated)

    def _note_ends(self, index: int, ends: list[list[Any]], unit: nn.Module, args: Any, output: Any) -> None:
        latest = max(place for place, use in enumerate(self._uses) if use.unit == index)
        ends[latest] = [tensor.grad_fn for tensor in _needing_gradient(output)]

    def _agree(self, nodes: set[Any], ends: list[list[Any]]) -> None:
        """What the backward pass comes to, as the ranks that have a loss see it. Collective."""
        graded = {id(node.variable) for node in nodes if hasattr(node, "variable")}
        reached = [any(node in nodes for node in own) for own in ends]
        reached += [False] * (len(self._uses) - len(ends))
        used = [id(one.unsharded_param) in graded for one in self._sharded]
        used += [id(parameter) in graded for parameter in self._replicated]
        flags = torch.tensor(reached + used, dtype=torch.int32, device=self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        agreed = flags.tolist()
        for use, is_reached in zip(self._uses, agreed, strict=False):
            use.is_reached = bool(is_reached)
        parameters = [*(one.sharded_param for one in self._sharded), *self._replicated]
        self._unused = {
            id(parameter)
            for parameter, is_used in zip(parameters, agreed[len(self._uses) :], strict=True)
            if not is_used
        }

    def _follow_announced(self) -> None:
        running: list[_Use] = []
        while (announced := self._announce(0)) not in (0, _END):
            use = _Use((announced - 1) // 2, is_differentiated=announced % 2 == 0)
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
        state = get_state(unit)
        if is_begin:
            run_pre_forward(state, unit, (), {})
        else:
            run_post_forward(state, unit, (), None)

    def _skipped(self) -> ZeroLoss:
        anchor = torch.zeros((), device=self._device, requires_grad=True)
        loss = _NoGradients.apply(anchor, partial(self._pass_backward, self._passes()))
        return ZeroLoss(loss=loss)

    def _pass_backward(self, passes: Sequence[tuple[_Use, bool]], gradient: Tensor) -> None:
        run_pre_backward(get_state(self._root), gradient)
        reached = [one for one in passes if one[0].is_reached]
        num_left = Counter(use.unit for use, is_begin in reached if is_begin)
        for use, is_begin in reversed(reached):
            unit = self._units[use.unit]
            if not is_begin:
                run_pre_backward(get_state(unit), gradient)
                continue
            num_left[use.unit] -= 1
            for group in _groups_of(unit):
                if num_left[use.unit] == 0:  # autograd adds up the gradients of all uses before anybody sees them
                    self._set_zero(group)
                if use.is_differentiated:
                    group.post_backward()
        for group in _groups_of(self._root):
            self._set_zero(group)
        for parameter in self._replicated:
            if parameter.requires_grad and parameter.grad is None and id(parameter) not in self._unused:
                parameter.grad = torch.zeros_like(parameter)

    def _set_zero(self, group: Any) -> None:
        for one in group.fsdp_params:
            own = one.unsharded_param
            is_missing = own.grad is None and one.unsharded_accumulated_grad is None
            if own.requires_grad and is_missing and id(one.sharded_param) not in self._unused:
                own.grad = torch.zeros_like(own)


class _NoGradients(torch.autograd.Function):
    """A loss of zero whose backward pass is the given function of its gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        ctx.run = backward
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        run, ctx.run = ctx.run, None  # which refers to the module, and the loss may be around for longer
        run(gradient)
        return None, None


def _groups_of(unit: Any) -> list[Any]:
    return list_param_groups(get_state(unit))


def _nodes_below(outputs: Any) -> set[Any]:
    """Of the graph of a step's loss."""
    if isinstance(outputs, Mapping):
        outputs = outputs.get("loss", getattr(outputs, "minimize", None))
    waiting = [tensor.grad_fn for tensor in _needing_gradient(outputs)]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return seen


def _needing_gradient(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.requires_grad:
            yield values
    elif isinstance(values, dict):
        yield from _needing_gradient(tuple(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _needing_gradient(value)
