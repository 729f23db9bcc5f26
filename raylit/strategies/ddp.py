"""Data parallelism by torch's DistributedDataParallel. Worker."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raylit.errors import ModuleError
from raylit.strategies.averaging import TouchedGradients, Travel, average_gradients, broadcast
from raylit.strategies.base import PendingGradients, Skipped, TrainingStep
from raylit.strategies.batch_norm import SyncedBatchNorms
from raylit.strategies.compression import comm_hook
from raylit.strategies.single import Single
from raylit.strategy_options import DDPStrategy

_FIND_UNUSED = 'strategy="ddp_find_unused_parameters_true"'


class DDP(Single):
    """Every rank holds the whole model; gradients are averaged during the backward pass."""

    def __init__(self, options: DDPStrategy, *, is_syncing_batch_norm: bool = False) -> None:
        self._options = options
        # A static graph shows what is unused in its first step.
        self._is_finding_unused = options.find_unused_parameters and not options.static_graph
        self._travel = Travel.of(options)
        self._is_syncing_batch_norm = is_syncing_batch_norm
        self._batch_norms: SyncedBatchNorms | None = None

    @property
    def is_forward_collective(self) -> bool:  # type: ignore[override]
        return self._is_syncing_batch_norm

    def set_up(self, module: nn.Module, *, device: torch.device) -> None:
        if self._is_syncing_batch_norm:
            self._batch_norms = SyncedBatchNorms(module, device=device)

    def tear_down(self) -> None:
        if self._batch_norms is not None:
            self._batch_norms.restore()

    @property
    def needs_batch_on_every_rank(self) -> bool:
        return self._batch_norms is not None and bool(self._batch_norms.exchanged)

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
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, ignored)
        options = self._options
        ddp = DistributedDataParallel(
            step,
            find_unused_parameters=self._is_finding_unused,
            static_graph=options.static_graph,
            bucket_cap_mb=options.bucket_cap_mb,
            gradient_as_bucket_view=options.gradient_as_bucket_view,
            **_broadcasting(options),
        )
        if (hook := comm_hook(options)) is not None:
            ddp.register_comm_hook(options.ddp_comm_state, hook)
        if self._is_finding_unused:
            return partial(_searched, ddp)
        return partial(_static, ddp) if options.static_graph else ddp

    def synced_check(self, step: TrainingStep) -> Callable[[], None] | None:
        # With find_unused_parameters DDP counts what is missing as zero, and says so of all that is.
        ddp = _ddp_of(step)
        return None if ddp is None or self._is_finding_unused else partial(_check_synced, ddp)

    def without_sync(self, step: TrainingStep) -> AbstractContextManager[object]:
        ddp = _ddp_of(step)
        # The first backward pass of a static graph has to sync. What is synced in a window before its end is alike on
        # all ranks, so that the window's gradients are the same.
        is_learning = self._options.static_graph and ddp is not None and not ddp._static_graph_delay_allreduce_enqueued
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


class _StepModule(nn.Module):
    """Lets DDP's forward be the user's training_step."""

    def __init__(self, module: nn.Module, training_step: TrainingStep, trained: set[str]) -> None:
        super().__init__()
        self.module = module
        self.trained = trained
        self._training_step = training_step

    def forward(self, *args: Any) -> Any:
        outputs = self._training_step(*args)
        return Skipped(loss=self._nothing()) if outputs is None else outputs

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
    if not ddp._static_graph_delay_allreduce_enqueued and isinstance(outputs, Mapping) and type(outputs) is not dict:
        # DDP starts its first reduction by way of what forward returns, and looks into lists and dicts only.
        for value in outputs.values():
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(partial(_reduce_at_the_end, ddp))
    return outputs


def _reduce_at_the_end(ddp: DistributedDataParallel, gradient: Tensor) -> None:
    if not ddp._static_graph_delay_allreduce_enqueued:
        reducer: Any = ddp.reducer
        torch.autograd.Variable._execution_engine.queue_callback(reducer._delay_all_reduce)
        ddp._static_graph_delay_allreduce_enqueued = True


def _ddp_of(step: TrainingStep) -> DistributedDataParallel | None:
    """What a wrapped step calls; None: it is the user's own."""
    ddp = step.args[0] if isinstance(step, partial) and step.args else step
    return ddp if isinstance(ddp, DistributedDataParallel) else None


def _check_synced(ddp: DistributedDataParallel) -> None:
    """Raises on this rank; the others may wait in the reduction until the driver ends them."""
    try:
        # Private to torch. DDP itself asks this at the start of the next forward pass, when other ranks may have gone
        # on to another collective.
        ddp.reducer._rebuild_buckets()
    except RuntimeError as error:
        if "Expected to have finished reduction" not in str(error):
            raise
        unused = [name for name, parameter in ddp.module.named_trained() if parameter.grad is None]
        raise ModuleError(
            f"the loss does not depend on {', '.join(unused) or 'a parameter'}, whose gradient the other workers wait "
            f"for: use it, freeze it (requires_grad_(False)), leave it out of the optimizer, or pass {_FIND_UNUSED}"
        ) from error
