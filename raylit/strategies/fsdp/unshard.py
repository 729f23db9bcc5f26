"""Unsharded parameters outside of forward, removal of the sharding, and memory of FSDP on the CPU. Worker."""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

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
from raylit.errors import ModuleError
from raylit.strategies.base import TrainingStep
from raylit.strategies.fsdp.skipped_batches import CollectiveSchedule

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
