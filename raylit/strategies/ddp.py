"""Data parallelism by torch's DistributedDataParallel. Worker."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raylit.errors import ModuleError
from raylit.strategies.averaging import TouchedGradients, average_gradients
from raylit.strategies.base import PendingGradients, Skipped, TrainingStep
from raylit.strategies.batch_norm import SyncedBatchNorms
from raylit.strategies.single import SingleStrategy

_FIND_UNUSED = 'strategy="ddp_find_unused_parameters_true"'


class DDPStrategy(SingleStrategy):
    """Every rank holds the whole model; gradients are averaged during the backward pass."""

    def __init__(self, *, is_finding_unused: bool = False, is_syncing_batch_norm: bool = False) -> None:
        self._is_finding_unused = is_finding_unused
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
        # Gradients that are views of the buckets they travel in are not copied back: 7 % of a step of 3 million
        # parameters on two CPU workers.
        ddp = DistributedDataParallel(
            step, find_unused_parameters=self._is_finding_unused, gradient_as_bucket_view=True
        )
        return partial(_searched, ddp) if self._is_finding_unused else ddp

    def synced_check(self, step: TrainingStep) -> Callable[[], None] | None:
        # With find_unused_parameters DDP counts what is missing as zero, and says so of all that is.
        return partial(_check_synced, step) if isinstance(step, DistributedDataParallel) else None

    def without_sync(self, step: TrainingStep) -> AbstractContextManager[object]:
        ddp = step.args[0] if isinstance(step, partial) else step
        return ddp.no_sync() if isinstance(ddp, DistributedDataParallel) else nullcontext()

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        average_gradients([parameter for parameter in parameters if parameter.requires_grad])

    def pending_gradients(self, module: nn.Module) -> PendingGradients | None:
        return TouchedGradients(module.parameters())

    def share_weights(self, module: nn.Module) -> None:
        _broadcast(parameter.data for parameter in module.parameters())
        self.sync_buffers(module)

    def sync_buffers(self, module: nn.Module) -> None:
        _broadcast(module.buffers())


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


def _broadcast(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        copy = tensor.contiguous()
        dist.broadcast(copy, src=0)
        if copy is not tensor:
            tensor.copy_(copy)
