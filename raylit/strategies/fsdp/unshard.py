"""Unsharded parameters outside of forward: methods beside it, and the memory freed afterwards."""

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
    """Those of one module, until `restore`."""

    def __init__(self, module: nn.Module, *, steps: Sequence[str], is_manual: bool) -> None:
        """`is_manual`: backward passes and steps are in `training_step`, around which nothing can be gathered then."""
        self._module = module
        self._state: Any = get_state(module)
        self._is_running = False
        self._course: CollectiveSchedule | None = None
        """Of the training step that runs."""
        remove_forward_hooks(self._state)
        self._names = [*steps, _CALL]
        for name in self._names:
            own = getattr(module, name)
            if name == "training_step":
                setattr(module, name, _explaining(own) if is_manual else self._entering(self._skippable(own)))
            else:
                setattr(module, name, self._entering(own))

    def restore(self) -> None:
        for name in self._names:
            del vars(self._module)[name]

    def run_on(self, course: CollectiveSchedule, training_step: TrainingStep, *args: Any) -> Any:
        """The step, which may skip its batch where the others run theirs."""
        self._course = course
        try:
            return training_step(*args)
        finally:
            self._course = None

    def _skippable(self, own: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(own)
        def step(*args: Any, **kwargs: Any) -> Any:
            course, self._course = self._course, None
            return own(*args, **kwargs) if course is None else course.run(partial(own, **kwargs), *args)

        return step

    def _entering(self, own: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(own)
        @_explaining
        def entered(*args: Any, **kwargs: Any) -> Any:
            if self._is_running:
                return own(*args, **kwargs)
            self._is_running = True
            try:
                args, kwargs = run_pre_forward(self._state, self._module, args, kwargs)
                return run_post_forward(self._state, self._module, args, own(*args, **kwargs))
            finally:
                self._is_running = False

        return entered


def _explaining(own: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of torch's word on shards in a computation."""

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


def forget_sharding(part: nn.Module, added: set[str]) -> None:
    """Class, hooks and attributes as they were."""
    if isinstance(part, FSDPModule):
        remove_sharding(part)
    for name in added & set(vars(part)):
        del vars(part)[name]


def leave_on_meta(module: nn.Module) -> None:
    """Parameters of the whole shape without numbers, in the place of shards; buffers on the CPU."""
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
"""Of glibc's mallopt: what is at least that large has pages of its own, which go with it."""
_EAGER_BYTES = 2**20
_USUAL_BYTES = 32 * 2**20
"""Up to which glibc raises its threshold by itself as large memory comes and goes."""


def free_eagerly(*, is_eager: bool) -> None:
    """Freed memory otherwise stays in holes between what is in use. Pages that come anew each time cost the system's
    clearing them. Nothing where malloc is not glibc's."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _EAGER_BYTES if is_eager else _USUAL_BYTES)


def hold_little(units: Iterable[Any]) -> None:
    """Of fully_shard's units on the CPU: no copies that wait for a stream, nothing gathered ahead of its use. There
    are no streams and nothing overlaps, so that it would only take memory: three units' worth."""
    for unit in units:
        # By itself: torch takes an empty list for its own choice, which is the unit before.
        unit.set_modules_to_backward_prefetch([unit])
        copy_out_at_once(unit)
        for group in list_param_groups(get_state(unit)):
            unit.set_custom_reduce_scatter(_LettingGo(get_reduce_scatter(group)))


class _LettingGo:
    """A reduce-scatter whose input torch would keep until the next unit's turn."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.allocate = inner.allocate

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        work = self._inner(output_tensor=output_tensor, input_tensor=input_tensor, group=group, op=op)
        input_tensor.untyped_storage().resize_(0)
        return work
