"""Data parallelism by torch's DistributedDataParallel. Worker."""

import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raylit.compat.torch_ddp import (
    ReversedDDP,
    has_static_graph_reduced,
    ignore_parameters,
    push_all_parameters,
    queue_static_graph_reduction,
    rebuild_buckets,
)
from raylit.config.strategy import DDPStrategy
from raylit.errors import ModuleError
from raylit.strategies.base import PendingGradients, SyncedCheck, TrainingStep, ZeroLoss
from raylit.strategies.ddp.grad_averaging import (
    ReducedPrecision,
    TouchedGradients,
    average_gradients,
    broadcast,
    comm_hook,
)
from raylit.strategies.single import Single
from raylit.strategies.sync_batch_norm import SyncedBatchNorms

_FIND_UNUSED = 'strategy="ddp_find_unused_parameters_true"'


class DDP(Single):
    """Every rank holds the whole model; gradients are averaged during the backward pass."""

    def __init__(self, options: DDPStrategy, *, is_syncing_batch_norm: bool = False) -> None:
        self._options = options
        # A static graph shows what is unused in its first step.
        self._is_finding_unused = options.find_unused_parameters is True and not options.static_graph
        self._may_find_unused = options.find_unused_parameters == "auto" and not options.static_graph
        self._travel = ReducedPrecision.of(options)
        self._is_syncing_batch_norm = is_syncing_batch_norm
        self._batch_norms: SyncedBatchNorms | None = None

    @property
    def is_forward_collective(self) -> bool:  # type: ignore[override]
        return self._is_syncing_batch_norm

    @property
    def is_finding_unused(self) -> bool:  # type: ignore[override]
        return self._is_finding_unused

    def find_unused(self) -> None:
        self._is_finding_unused = self._is_finding_unused or self._may_find_unused

    def set_up(self, module: nn.Module, *, device: torch.device) -> None:
        if self._is_syncing_batch_norm:
            self._batch_norms = SyncedBatchNorms(module, device=device)

    def tear_down(self) -> None:
        if self._batch_norms is not None:
            self._batch_norms.restore()

    @property
    def needs_batch_on_every_rank(self) -> bool:
        return self._batch_norms is not None and self._batch_norms.needs_batch_on_every_rank

    def silence(self, *, is_silent: bool) -> None:
        if self._batch_norms is not None:
            self._batch_norms.silence(is_silent=is_silent)

    def wrap(self, module: nn.Module, training_step: TrainingStep, *, trained: Sequence[nn.Parameter]) -> TrainingStep:
        wanted = {id(parameter) for parameter in trained}
        names = {name for name, parameter in module.named_parameters() if id(parameter) in wanted}
        if not names:
            self.share_weights(module)
            return training_step
        kind = _SearchedStepModule if self._is_finding_unused else _StepModule
        step = kind(module, training_step, names)
        # What this optimizer does not train it need not sync: another's wrapped step does, or nobody has to.
        ignored = [f"module.{name}" for name, _ in module.named_parameters(remove_duplicate=False) if name not in names]
        ignore_parameters(step, ignored)
        options = self._options
        kind_of_ddp = DistributedDataParallel if self._is_finding_unused else _SteadyDDP
        ddp = kind_of_ddp(
            step,
            find_unused_parameters=self._is_finding_unused,
            static_graph=options.static_graph,
            bucket_cap_mb=options.bucket_cap_mb,
            gradient_as_bucket_view=options.gradient_as_bucket_view,
            **_broadcasting(options),
        )
        if (hook := comm_hook(options)) is not None:
            ddp.register_comm_hook(options.ddp_comm_state, hook)
        if isinstance(ddp, _SteadyDDP):
            ddp.build_final_buckets()
        if self._is_finding_unused:
            return partial(_searched, ddp)
        return partial(_static, ddp) if options.static_graph else ddp

    def synced_check(self, step: TrainingStep) -> SyncedCheck | None:
        # With find_unused_parameters DDP counts what is missing as zero, and says so of all that is.
        ddp = _ddp_of(step)
        if not isinstance(ddp, _SteadyDDP):
            return None
        return _UnusedSearch(ddp, on_found=self.find_unused) if self._may_find_unused else _UnusedError(ddp)

    def without_sync(self, step: TrainingStep) -> AbstractContextManager[object]:
        ddp = _ddp_of(step)
        # The first backward pass of a static graph has to sync. What is synced in a window before its end is alike on
        # all ranks, so that the window's gradients are the same.
        is_learning = self._options.static_graph and ddp is not None and not has_static_graph_reduced(ddp)
        return nullcontext() if ddp is None or is_learning else ddp.no_sync()

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        average_gradients([parameter for parameter in parameters if parameter.requires_grad], travel=self._travel)

    def pending_gradients(self, module: nn.Module) -> PendingGradients | None:
        return TouchedGradients(module.parameters(), travel=self._travel)

    def share_weights(self, module: nn.Module) -> None:
        broadcast(parameter.data for parameter in module.parameters())
        self.sync_buffers(module)

    def sync_buffers(self, module: nn.Module) -> None:
        broadcast(module.buffers())


class _SteadyDDP(ReversedDDP):
    """DDP whose first step sums gradients in the order in which all later ones do.

    DDP learns in its first step in which order gradients arrive and then sorts them into other buckets. Three and more
    ranks add up in an order that depends on where in a bucket a number stands, so that the first step after a resume
    would differ in its last bits from the same step of the run that went through. Here the final buckets are there from
    the start, in the order that DDP assumes before it knows better: backwards from what the module has defined last.
    """

    def build_final_buckets(self) -> None:
        """Collective."""
        push_all_parameters(self)
        rebuild_buckets(self)

    def unused_parameters(self) -> list[nn.Parameter]:
        """Those that the last backward pass has not come to, so that the reduction of all that share a bucket with one
        of them is still to be done, and the other ranks may wait in it."""
        try:
            # DDP itself asks this at the start of the next forward pass, when other ranks may have gone on to another
            # collective.
            rebuild_buckets(self)
        except RuntimeError as error:
            found = _MISSING.search(str(error))
            if found is None:
                raise
            return [self.synced_parameters[int(index)] for index in found[1].split()]
        return []

    def names_of(self, parameters: Iterable[nn.Parameter]) -> str:
        wanted = {id(parameter) for parameter in parameters}
        return ", ".join(name for name, parameter in self.module.named_trained() if id(parameter) in wanted)


_MISSING = re.compile(r"Expected to have finished reduction.*did not receive grad for rank \d+:([ \d]+)", re.DOTALL)
"""What torch says of a backward pass that has left parameters out, by their indices."""


class _StepModule(nn.Module):
    """Lets DDP's forward be the user's training_step."""

    def __init__(self, module: nn.Module, training_step: TrainingStep, trained: set[str]) -> None:
        super().__init__()
        self.module = module
        self.trained = trained
        self._training_step = training_step

    def forward(self, *args: Any) -> Any:
        outputs = self._training_step(*args)
        return ZeroLoss(loss=self._nothing()) if outputs is None else outputs

    def named_trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if name in self.trained)

    def _nothing(self) -> Tensor:
        zeros = [parameter.sum() * 0.0 for _, parameter in self.named_trained()]
        return sum(zeros[1:], zeros[0])


class _SearchedStepModule(_StepModule):
    """DDP looks for tensors in what its forward returns, and knows lists and dicts, but no results."""

    def forward(self, *args: Any) -> Any:
        outputs = super().forward(*args)
        found = [value for value in outputs.values() if isinstance(value, Tensor)] if _is_mapping(outputs) else []
        return [outputs, found]


def _is_mapping(outputs: Any) -> bool:
    return isinstance(outputs, Mapping) and not isinstance(outputs, dict)


def _searched(ddp: DistributedDataParallel, *args: Any) -> Any:
    return ddp(*args)[0]


def _broadcasting(options: DDPStrategy) -> dict[str, Any]:
    if options.broadcast_buffers:
        return {}
    # torch 2.13 warns of the older name.
    is_renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if is_renamed else "broadcast_buffers": False}


def _static(ddp: DistributedDataParallel, *args: Any) -> Any:
    outputs = ddp(*args)
    if not has_static_graph_reduced(ddp) and isinstance(outputs, Mapping) and type(outputs) is not dict:
        # DDP starts its first reduction by way of what forward returns, and looks into lists and dicts only.
        for value in outputs.values():
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(partial(_reduce_at_the_end, ddp))
    return outputs


def _reduce_at_the_end(ddp: DistributedDataParallel, gradient: Tensor) -> None:
    if not has_static_graph_reduced(ddp):
        queue_static_graph_reduction(ddp)


def _ddp_of(step: TrainingStep) -> DistributedDataParallel | None:
    """What a wrapped step calls; None: it is the user's own."""
    ddp = step.args[0] if isinstance(step, partial) and step.args else step
    return ddp if isinstance(ddp, DistributedDataParallel) else None


class _UnusedError:
    """A parameter that the loss does not depend on is an error, on this rank; the others may wait in the reduction
    until the driver ends them."""

    def __init__(self, ddp: _SteadyDDP) -> None:
        self._ddp = ddp

    def __call__(self) -> bool:
        if unused := self._ddp.unused_parameters():
            raise ModuleError(
                f"the loss does not depend on {self._ddp.names_of(unused)}, whose gradient the other workers wait "
                f"for: use it, freeze it (requires_grad_(False)), leave it out of the optimizer, or pass {_FIND_UNUSED}"
            )
        return False

    def is_renewal_due(self) -> bool:
        return False


class _UnusedSearch:
    """A parameter that the loss does not depend on counts as zero, and has no gradient where no rank has one for it, as
    in a single process.

    All ranks compare notes after the first step: where a parameter was left out, steps are wrapped anew so that DDP
    looks for such parameters itself. In a later step a rank that has left one out cannot tell the others at once, which
    may know nothing of it. It completes the reduction that they wait in, and they compare notes again at the end of the
    epoch.
    """

    def __init__(self, ddp: _SteadyDDP, *, on_found: Callable[[], None]) -> None:
        self._ddp = ddp
        self._on_found = on_found
        self._is_first = True
        self._found: list[nn.Parameter] = []
        """On this rank, since the first step."""

    def __call__(self) -> bool:
        unused = self._ddp.unused_parameters()
        if self._is_first:
            self._is_first = False
            return self._agree(unused)
        if unused:
            self._complete_alone(unused)
        return False

    def is_renewal_due(self) -> bool:
        if self._is_first:  # there has been no step
            return False
        flag = torch.tensor(float(bool(self._found)), device=self._ddp.synced_parameters[0].device)
        dist.all_reduce(flag)
        if flag.item() == 0:
            return False
        self._on_found()
        return True

    def _agree(self, unused: list[nn.Parameter]) -> bool:
        """After the first step. Collective."""
        parameters = self._ddp.synced_parameters
        left_out = {id(parameter) for parameter in unused}
        without = [parameter for parameter in unused if parameter.grad is None]
        if unused:
            self._complete(unused)
        flags = [float(id(parameter) in left_out) for parameter in parameters]
        counts = torch.tensor(flags, device=parameters[0].device)
        dist.all_reduce(counts)
        num_ranks = dict(zip(map(id, parameters), counts.tolist(), strict=True))
        for parameter in without:
            if num_ranks[id(parameter)] == dist.get_world_size():
                parameter.grad = None
        if found := [parameter for parameter in parameters if num_ranks[id(parameter)] > 0]:
            self._on_found()
            self._found = found
            if dist.get_rank() == 0:
                self._warn(found)
        return bool(found)

    def _complete_alone(self, unused: list[nn.Parameter]) -> None:
        """In a step of which the other ranks may know nothing."""
        without = [parameter for parameter in unused if parameter.grad is None]
        self._complete(unused)
        if not self._found:
            self._warn(unused)
        self._found = unused
        if without:
            # Only zeros below zero add up to such a one: no rank has had a gradient.
            are_left_out = torch.stack([_is_negative_zero(parameter) for parameter in without]).tolist()
            for parameter, is_left_out in zip(without, are_left_out, strict=True):
                if is_left_out:
                    parameter.grad = None

    def _complete(self, unused: list[nn.Parameter]) -> None:
        """The reduction, with zeros that show where they have been added to nothing else."""
        torch.autograd.backward(unused, [torch.full_like(parameter, -0.0) for parameter in unused])
        if self._ddp.unused_parameters():
            raise ModuleError(f"the gradients of {self._ddp.names_of(unused)} cannot be reduced: pass {_FIND_UNUSED}")

    def _warn(self, unused: list[nn.Parameter]) -> None:
        warnings.warn(
            f"the loss does not depend on {self._ddp.names_of(unused)}: training goes on, and from here on each step "
            "looks for such parameters, which takes a walk through its graph and a further small reduction. To spare "
            "it, freeze them (requires_grad_(False)) or leave them out of the optimizer; strategy='ddp' makes them an "
            f"error, and {_FIND_UNUSED} looks for them without a word",
            stacklevel=2,
        )


def _is_negative_zero(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return (torch.signbit(gradient) & (gradient == 0)).all()
