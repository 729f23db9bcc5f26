"""Sharded parameters: local shards, gathered copies, the loss scale, and unsharding outside of forward. Worker."""

import copy
import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from raylit.compat.torch_fsdp import (
    copy_out_at_once,
    get_reduce_scatter,
    get_state,
    list_param_groups,
    remove_forward_hooks,
    remove_sharding,
    run_post_forward,
    run_pre_forward,
)
from raylit.compat.torch_optim import LocalGradScaler
from raylit.errors import CheckpointError, ModuleError
from raylit.strategies.base import TrainingStep
from raylit.strategies.fsdp.skipped_batches import CollectiveSchedule


def list_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's shards of the tensors; an empty shard becomes a single zero."""
    own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return [tensor if tensor.numel() > 0 else tensor.new_zeros(1) for tensor in own]


def gather_full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor on the CPU. Collective if it is sharded."""
    own = tensor.detach()
    return (own.full_tensor() if isinstance(own, DTensor) else own).cpu()


def all_gather_shards(value: Any) -> Any:
    """Return the value with whole tensors on rank 0, gathered one after the other. Collective.

    Tensors are None on the other ranks.
    """
    if isinstance(value, Tensor):
        tensor = gather_full_tensor(value)
        return tensor if dist.get_rank() == 0 else None
    if isinstance(value, dict):
        together = copy.copy(value)
        for name, item in value.items():
            together[name] = all_gather_shards(item)
        return together
    return type(value)(all_gather_shards(item) for item in value) if type(value) in (list, tuple) else value


def build_local_value(
    value: Any, own: Any, where: str, targets: dict[str, Tensor], *, is_in_place: bool = False
) -> Any:
    """Return the local form of a saved value: sharded as `own` is, if the shapes agree.

    For a placeholder that is a target tensor, which is added to `targets` for its numbers to be read; with
    `is_in_place` the target is `own` itself.
    """
    if not isinstance(value, Tensor):
        return value
    is_alike = isinstance(own, DTensor) and value.shape == own.shape
    if value.is_meta:
        if not is_alike:
            targets[where] = torch.empty(value.shape, dtype=value.dtype)
        else:
            targets[where] = own.detach() if is_in_place else torch.empty_like(own.detach(), dtype=value.dtype)
        return targets[where]
    if not is_alike:
        return value
    # Every rank has the whole tensor, so that nothing needs to be sent.
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def build_local_state(
    state: dict[str, Any], optimizer: Optimizer, where: str, targets: dict[str, Tensor]
) -> dict[str, Any]:
    """Return the local form of an optimizer's saved state, as `build_local_value` does for a value.

    Raises:
        CheckpointError: the optimizer has another number of parameters than the saved one.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    if len(indices) != len(parameters):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(indices)} parameters, {type(optimizer).__name__} here has "
            f"{len(parameters)}: resume with the optimizer that it was saved with"
        )
    own = dict(zip(indices, parameters, strict=True))
    local_state = {
        index: {
            name: build_local_value(value, own[index], f"{where}.state.{index}.{name}", targets)
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": local_state}


class ShardedScaler(LocalGradScaler):
    """Gradient scaler with which all ranks skip a step if one rank's shard has a number that is not finite.

    torch's own scaler cannot have sharded and whole gradients in one optimizer.
    """

    def select_gradients(self, gradients: list[Tensor]) -> list[Tensor]:
        return list_shards(gradients)

    def combine_found_inf(self, found_inf: Tensor) -> None:
        dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)


_CALL = "forward"


class MethodEntryPoints:
    """Entry points of a sharded module: methods around which its parameters are gathered, until `restore`."""

    def __init__(self, module: nn.Module, *, steps: Sequence[str], is_manual: bool) -> None:
        """Wrap the methods `steps` and `forward` of the module.

        With `is_manual`, backward passes and optimizer steps are in `training_step`, around which nothing can be
        gathered then.
        """
        self._module = module
        self._state: Any = get_state(module)
        self._is_running = False
        self._schedule: CollectiveSchedule | None = None
        """Schedule of the training step that runs."""
        remove_forward_hooks(self._state)
        self._names = [*steps, _CALL]
        for name in self._names:
            own = getattr(module, name)
            if name == "training_step":
                setattr(
                    module, name, _explain_errors(own) if is_manual else self._gather_around(self._make_skippable(own))
                )
            else:
                setattr(module, name, self._gather_around(own))

    def restore(self) -> None:
        """Put the module's own methods back."""
        for name in self._names:
            del vars(self._module)[name]

    def run_step(self, schedule: CollectiveSchedule, training_step: TrainingStep, *args: Any) -> Any:
        """Run the step, which may skip its batch while the other ranks run theirs. Collective."""
        self._schedule = schedule
        try:
            return training_step(*args)
        finally:
            self._schedule = None

    def _make_skippable(self, own: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(own)
        def step(*args: Any, **kwargs: Any) -> Any:
            schedule, self._schedule = self._schedule, None
            return own(*args, **kwargs) if schedule is None else schedule.run(partial(own, **kwargs), *args)

        return step

    def _gather_around(self, own: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(own)
        @_explain_errors
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_running:
                return own(*args, **kwargs)
            self._is_running = True
            try:
                args, kwargs = run_pre_forward(self._state, self._module, args, kwargs)
                return run_post_forward(self._state, self._module, args, own(*args, **kwargs))
            finally:
                self._is_running = False

        return call


def forget_sharding(part: nn.Module, added: set[str]) -> None:
    """Remove the class, the hooks and the attributes that sharding has added to a module."""
    if isinstance(part, FSDPModule):
        remove_sharding(part)
    for name in added & set(vars(part)):
        del vars(part)[name]


def leave_on_meta(module: nn.Module) -> None:
    """Replace shards by parameters of the whole shape on the meta device, and move buffers to the CPU."""
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in whole:
                meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                whole[parameter] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
            setattr(part, name, whole[parameter])
        for name, buffer in list(part.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(part, name, buffer.cpu())


_M_MMAP_THRESHOLD = -3
"""Option of glibc's mallopt: memory of at least that size has pages of its own, which are freed with it."""
_EAGER_BYTES = 2**20
_USUAL_BYTES = 32 * 2**20
"""Size up to which glibc raises its threshold by itself when large memory is allocated and freed."""


def free_eagerly(*, is_eager: bool) -> None:
    """Return freed memory to the system at once, or restore the usual threshold.

    Freed memory otherwise stays in holes between what is in use. The price is that the system clears new pages at
    each allocation. It does nothing if malloc is not glibc's.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _EAGER_BYTES if is_eager else _USUAL_BYTES)


def minimize_memory(units: Iterable[Any]) -> None:
    """Keep as few units as possible in memory on the CPU, for units of `fully_shard`.

    Copies do not wait for a stream, and nothing is gathered ahead of its use: on the CPU there are no streams and
    nothing overlaps, so that prefetching would only take the memory of three units.
    """
    for unit in units:
        # A unit prefetches itself, as torch replaces an empty list by its own choice, the unit before.
        unit.set_modules_to_backward_prefetch([unit])
        copy_out_at_once(unit)
        for group in list_param_groups(get_state(unit)):
            unit.set_custom_reduce_scatter(_FreeingReduceScatter(get_reduce_scatter(group)))


def _explain_errors(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a plain error in the place of torch's error for shards in a computation."""

    @wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        try:
            return own(*args, **kwargs)
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" not in str(error):
                raise
            raise ModuleError(
                "a parameter was used while strategy='fsdp' had not gathered it. A part's parameters are there while "
                "it is called, self.part(x), and not where other code takes them: call the part, give an "
                "auto_wrap_policy whose classes keep together what is used together, or use strategy='ddp'"
            ) from error

    return step


class _FreeingReduceScatter:
    """Reduce-scatter that frees its input at once, which torch would keep until the next unit's turn."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.allocate = inner.allocate

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        work = self._inner(output_tensor=output_tensor, input_tensor=input_tensor, group=group, op=op)
        input_tensor.untyped_storage().resize_(0)
        return work
