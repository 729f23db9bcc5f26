"""Matching FSDP collectives when a rank's training_step returns None, unit by unit. Worker."""

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
"""Code announced after the last unit of a forward pass."""


@dataclass(slots=True)
class _UnitCall:
    """One call of a unit within a forward pass."""

    unit: int
    """Index of the unit."""
    is_differentiated: bool
    """Whether some input needs a gradient: torch then reduces the unit's gradients during the backward pass."""
    is_reached: bool = True
    """Whether the backward pass reaches the call."""


class CollectiveSchedule:
    """Order in which a training step calls the units of a model, and which of them its loss depends on.

    The schedule is learned in the first step, in which ranks announce each unit to each other before its call, as a
    rank that skips the batch cannot know it. From then on a rank that skips its batch runs the collectives of the calls
    that it has not made, without the computations.
    """

    def __init__(self, root: Any, *, replicated: Sequence[nn.Parameter], device: torch.device) -> None:
        self._root = root
        self._replicated = replicated
        self._device = device
        self._units: list[Any] = [
            part for part in root.modules() if part is not root and isinstance(part, FSDPModule) and _list_groups(part)
        ]
        self._contained = [set(unit.modules()) - {unit} for unit in self._units]
        self._sharded = [one for part in (root, *self._units) for one in list_sharded_parameters(get_state(part))]
        self._calls: list[_UnitCall] = []
        self._unused: set[int] = set()
        """Parameters that the loss does not depend on, sharded and replicated ones, by `id`."""
        self._is_known = False

    def run(self, step: TrainingStep, *args: Any) -> Any:
        """Return the step's outputs; in the place of None a loss whose gradients are zero. Collective."""
        if not self._is_known:
            return self._run_learning(step, *args)
        order = get_forward_order(get_state(self._root))
        start = len(order)
        outputs = step(*args)
        if outputs is not None:
            return outputs
        self._run_rest(num_done=sum(self._root not in group.modules for group in order[start:]))
        return self._build_zero_loss()

    def _run_learning(self, step: TrainingStep, *args: Any) -> Any:
        """Run the step while ranks announce each unit, and learn the schedule from it. Collective."""
        self._calls, self._unused = [], set()
        ends: list[list[Any]] = []
        """For each call the graph's nodes in which its outputs end."""
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
            self._run_announced()
        if self._is_known:
            self._agree(_collect_graph_nodes(outputs), ends)
        return self._build_zero_loss() if outputs is None else outputs

    def _announce_own(self, index: int, ends: list[list[Any]], unit: nn.Module, args: Any, kwargs: Any) -> None:
        is_differentiated = torch.is_grad_enabled() and any(True for _ in _iterate_differentiable((args, kwargs)))
        self._calls.append(_UnitCall(index, is_differentiated))
        ends.append([])
        self._announce(2 * index + 1 + is_differentiated)

    def _note_ends(self, index: int, ends: list[list[Any]], unit: nn.Module, args: Any, output: Any) -> None:
        latest = max(index_of_call for index_of_call, call in enumerate(self._calls) if call.unit == index)
        ends[latest] = [tensor.grad_fn for tensor in _iterate_differentiable(output)]

    def _agree(self, nodes: set[Any], ends: list[list[Any]]) -> None:
        """Agree with the ranks that have a loss on what the backward pass reaches. Collective."""
        graded = {id(node.variable) for node in nodes if hasattr(node, "variable")}
        reached = [any(node in nodes for node in own) for own in ends]
        reached += [False] * (len(self._calls) - len(ends))
        used = [id(one.unsharded_param) in graded for one in self._sharded]
        used += [id(parameter) in graded for parameter in self._replicated]
        flags = torch.tensor(reached + used, dtype=torch.int32, device=self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        agreed = flags.tolist()
        for call, is_reached in zip(self._calls, agreed, strict=False):
            call.is_reached = bool(is_reached)
        parameters = [*(one.sharded_param for one in self._sharded), *self._replicated]
        self._unused = {
            id(parameter)
            for parameter, is_used in zip(parameters, agreed[len(self._calls) :], strict=True)
            if not is_used
        }

    def _run_announced(self) -> None:
        """Run the collectives of the units that the other ranks announce. Collective."""
        running: list[_UnitCall] = []
        while (announced := self._announce(0)) not in (0, _END):
            call = _UnitCall((announced - 1) // 2, is_differentiated=announced % 2 == 0)
            self._calls.append(call)
            for ended in self._end_calls_before(call, running):
                self._pass_forward(ended, is_begin=False)
            self._pass_forward(call, is_begin=True)
            running.append(call)
        for ended in reversed(running):
            self._pass_forward(ended, is_begin=False)
        self._is_known = announced == _END

    def _announce(self, code: int) -> int:
        """Return the largest code that a rank announces; 0 comes from ranks that do not run the step. Collective."""
        furthest = torch.tensor(code, dtype=torch.int64, device=self._device)
        dist.all_reduce(furthest, op=dist.ReduceOp.MAX)
        return int(furthest)

    def _run_rest(self, *, num_done: int) -> None:
        """Run begins and ends of units after the first `num_done` ends."""
        for call, is_begin in self._passes():
            if num_done == 0:
                self._pass_forward(call, is_begin=is_begin)
            elif not is_begin:
                num_done -= 1

    def _passes(self) -> list[tuple[_UnitCall, bool]]:
        passes: list[tuple[_UnitCall, bool]] = []
        running: list[_UnitCall] = []
        for call in self._calls:
            passes += [(ended, False) for ended in self._end_calls_before(call, running)]
            passes.append((call, True))
            running.append(call)
        return passes + [(ended, False) for ended in reversed(running)]

    def _end_calls_before(self, call: _UnitCall, running: list[_UnitCall]) -> Iterator[_UnitCall]:
        """Yield the running calls that have ended when this one begins: those whose unit does not contain its unit."""
        while running and self._units[call.unit] not in self._contained[running[-1].unit]:
            yield running.pop()

    def _pass_forward(self, call: _UnitCall, *, is_begin: bool) -> None:
        unit = self._units[call.unit]
        state = get_state(unit)
        if is_begin:
            run_pre_forward(state, unit, (), {})
        else:
            run_post_forward(state, unit, (), None)

    def _build_zero_loss(self) -> ZeroLoss:
        anchor = torch.zeros((), device=self._device, requires_grad=True)
        loss = _NoGradients.apply(anchor, partial(self._pass_backward, self._passes()))
        return ZeroLoss(loss=loss)

    def _pass_backward(self, passes: Sequence[tuple[_UnitCall, bool]], gradient: Tensor) -> None:
        run_pre_backward(get_state(self._root), gradient)
        reached = [one for one in passes if one[0].is_reached]
        num_left = Counter(call.unit for call, is_begin in reached if is_begin)
        for call, is_begin in reversed(reached):
            unit = self._units[call.unit]
            if not is_begin:
                run_pre_backward(get_state(unit), gradient)
                continue
            num_left[call.unit] -= 1
            for group in _list_groups(unit):
                if num_left[call.unit] == 0:  # autograd adds the gradients of all calls before hooks see them
                    self._set_zero(group)
                if call.is_differentiated:
                    group.post_backward()
        for group in _list_groups(self._root):
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
    """Loss of zero whose backward pass calls the given function with the loss's gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        ctx.run = backward
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        run, ctx.run = ctx.run, None  # it refers to the module, and the loss may be kept for longer
        run(gradient)
        return None, None


def _list_groups(unit: Any) -> list[Any]:
    return list_param_groups(get_state(unit))


def _collect_graph_nodes(outputs: Any) -> set[Any]:
    """Return the nodes of the graph of a step's loss."""
    if isinstance(outputs, Mapping):
        outputs = outputs.get("loss", getattr(outputs, "minimize", None))
    pending = [tensor.grad_fn for tensor in _iterate_differentiable(outputs)]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [next_node for next_node, _ in node.next_functions]
    return seen


def _iterate_differentiable(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.requires_grad:
            yield values
    elif isinstance(values, dict):
        yield from _iterate_differentiable(tuple(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _iterate_differentiable(value)
