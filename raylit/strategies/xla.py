"""SPMD: one model on all devices of a worker, whose compiled graph shares the work. Worker of an XLA run.

Within a worker nothing is left to do for a strategy but to divide the parameters, where that was asked for: the graph
is that of one process with the whole batch. Where each worker has an XLA world of its own, as on XLA's CPU device, the
workers average their gradients in host memory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch_xla
from torch import Tensor, nn
from torch.optim import Optimizer

from raylit.accelerators.transfer import map_tensors
from raylit.accelerators.xla import is_one_world, num_shards, shard_tensor
from raylit.config import SPMDStrategy
from raylit.strategies.base import PendingGradients, SyncCheck, TrainingStep, ZeroLoss
from raylit.strategies.ddp import TouchedGradients, materialize_gradients
from raylit.strategies.sharded_state import Reader
from raylit.strategies.single import Single


class SPMD(Single):
    """Strategy in which XLA's compiled graph divides the work of a step over the devices."""

    def __init__(self, options: SPMDStrategy, *, world_size: int) -> None:
        self._is_sharding_parameters = options.is_sharding_parameters
        self._world_size = world_size
        self._originals: dict[tuple[nn.Module, str], nn.Parameter] = {}
        """The user's own parameters by module and name: torch replaces parameters that move to XLA by others."""

    @property
    def is_forward_collective(self) -> bool:  # type: ignore[override]
        return self._world_size > 1 and is_one_world()

    @property
    def is_evaluation_collective(self) -> bool:  # type: ignore[override]
        return self._world_size > 1 and is_one_world()

    @property
    def is_gathering(self) -> bool:  # type: ignore[override]
        # Each rank takes part in reading what the graph has divided over all of them.
        return self._is_sharding_parameters and self._world_size > 1 and is_one_world()

    def place(
        self,
        module: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        steps: Sequence[str],
        is_manual: bool,
    ) -> None:
        self._originals = dict(_find_parameters(module))
        module.to(device=device, dtype=dtype)
        moved: dict[nn.Parameter, nn.Parameter] = {}
        for (owner, name), original in self._originals.items():
            # Tied weights stay one parameter.
            parameter = moved.setdefault(original, getattr(owner, name))
            setattr(owner, name, parameter)
        if self._is_sharding_parameters:
            for parameter in moved.values():
                _shard_parameter(parameter)
        torch_xla.sync()

    def restore_module(self, module: nn.Module) -> None:
        torch_xla.sync()
        module.to("cpu")
        restored: set[nn.Parameter] = set()
        for (owner, name), parameter in _find_parameters(module):
            original = self._originals.get((owner, name))
            if original is None:  # a hook has added it
                continue
            if original not in restored:
                restored.add(original)
                original.data = parameter.data
                original.grad = parameter.grad
                original.requires_grad_(parameter.requires_grad)
            setattr(owner, name, original)
        self._originals = {}

    def wrap(self, module: nn.Module, training_step: TrainingStep, *, trained: Sequence[nn.Parameter]) -> TrainingStep:
        if self._world_size == 1:
            return training_step
        self.share_weights(module)
        return training_step if is_one_world() else _HostReducedStep(training_step, trained)

    def build_sync_check(self, step: TrainingStep) -> SyncCheck | None:
        return _HostReduction(step.trained) if isinstance(step, _HostReducedStep) else None

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        if self._is_reducing_on_host:
            average_on_host([parameter for parameter in parameters if parameter.requires_grad])

    def pending_gradients(self, module: nn.Module) -> PendingGradients | None:
        return TouchedGradients(module.parameters(), average=average_on_host) if self._is_reducing_on_host else None

    def share_weights(self, module: nn.Module) -> None:
        if self._world_size > 1:
            _broadcast_on_host([parameter.data for parameter in module.parameters()])
            _broadcast_on_host(list(module.buffers()))

    def sync_buffers(self, module: nn.Module) -> None:
        if self._is_reducing_on_host:
            _broadcast_on_host(list(module.buffers()))

    def compute_norms(self, gradients: Sequence[Tensor], order: float) -> list[Tensor]:
        # One by one, as the compiler fuses them; torch has no kernel for all of them here.
        return [torch.linalg.vector_norm(gradient, order) for gradient in gradients]

    def evaluation_context(self, *, is_inference_mode: bool) -> AbstractContextManager[object]:
        # XLA changes tensors in place as it runs them, which inference tensors forbid.
        return torch.no_grad()

    def collect_state(self, state: dict[str, Any]) -> dict[str, Any]:
        torch_xla.sync()  # at once, rather than one graph for each tensor that is read
        return map_tensors(state, Tensor.cpu) if self.is_gathering else state

    def load_weights(self, module: nn.Module, state_dict: Mapping[str, Any], *, read: Reader | None) -> None:
        super().load_weights(module, state_dict, read=read)
        torch_xla.sync()

    def load_optimizer_states(
        self, optimizers: Sequence[Optimizer], states: Sequence[dict[str, Any]], *, read: Reader | None
    ) -> None:
        super().load_optimizer_states(optimizers, states, read=read)
        if self._is_sharding_parameters:
            for optimizer in optimizers:
                for parameter, state in optimizer.state.items():
                    for value in state.values():
                        if isinstance(value, Tensor) and value.shape == parameter.shape:
                            _shard_parameter(value)
        torch_xla.sync()

    @property
    def _is_reducing_on_host(self) -> bool:
        return self._world_size > 1 and not is_one_world()


def _find_parameters(module: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], nn.Parameter]]:
    """Yield each parameter with the submodule and the name that it stands under; a tied one at each of its places."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield (owner, name), parameter


def _shard_parameter(tensor: Tensor) -> None:
    """Divide a tensor along its longest dimension that the devices can share evenly; else each keeps the whole."""
    count = num_shards()
    divisible = [index for index, size in enumerate(tensor.shape) if size > 0 and size % count == 0]
    if divisible:
        shard_tensor(tensor, max(divisible, key=lambda index: tensor.shape[index]))


class _HostReducedStep:
    """A training step whose gradients are averaged in host memory after its backward pass."""

    def __init__(self, training_step: TrainingStep, trained: Sequence[nn.Parameter]) -> None:
        self._training_step = training_step
        self.trained = trained

    def __call__(self, *args: Any) -> Any:
        outputs = self._training_step(*args)
        if outputs is None and self.trained:
            # The other ranks wait for this one's gradients.
            return ZeroLoss(loss=torch.stack([parameter.sum() * 0.0 for parameter in self.trained]).sum())
        return outputs


class _HostReduction:
    """Average of the gradients over the ranks, after each backward pass that ends an accumulation window."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters

    def __call__(self) -> bool:
        average_on_host(self._parameters)
        return False

    def is_renewal_due(self) -> bool:
        return False


@torch.no_grad()
def average_on_host(parameters: Sequence[nn.Parameter], is_touched: Sequence[bool] | None = None) -> None:
    """Replace gradients on XLA by their mean over the ranks, on CPU copies. Collective; same parameters on every rank.

    For `is_touched` see `materialize_gradients`.
    """
    gradients = materialize_gradients(parameters, is_touched, device=torch.device("cpu"))
    torch_xla.sync()
    for group in _group_by_dtype(gradients):
        mean = torch.cat([gradient.reshape(-1) for gradient in group]).cpu()
        dist.all_reduce(mean.div_(dist.get_world_size()))
        _copy_flat(mean, group)


@torch.no_grad()
def _broadcast_on_host(tensors: Sequence[Tensor]) -> None:
    """Broadcast rank 0's values of tensors on XLA to all ranks, on CPU copies. Collective."""
    torch_xla.sync()
    for group in _group_by_dtype(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in group]).cpu()
        dist.broadcast(flat, src=0)
        _copy_flat(flat, group)
    torch_xla.sync()


def _copy_flat(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    moved = flat.to(tensors[0].device)
    for tensor, part in zip(tensors, moved.split([one.numel() for one in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _group_by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
