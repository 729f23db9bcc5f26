"""Data parallelism with torch's DistributedDataParallel, and averages of gradients outside of it. Worker."""

import inspect
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raylit.compat.torch_distributed import (
    ReversedDDP,
    has_static_graph_reduced,
    ignore_parameters,
    push_all_parameters,
    queue_static_graph_reduction,
    rebuild_buckets,
)
from raylit.config import CommHook, DDPStrategy
from raylit.errors import ModuleError
from raylit.strategies.base import PendingGradients, SyncCheck, TrainingStep, ZeroLoss
from raylit.strategies.single import Single
from raylit.strategies.sync_batch_norm import SyncedBatchNorms

_FIND_UNUSED = 'strategy="ddp_find_unused_parameters_true"'


class DDP(Single):
    """Strategy in which every rank holds the whole model and gradients are averaged during the backward pass."""

    def __init__(self, options: DDPStrategy, *, is_syncing_batch_norm: bool = False) -> None:
        self._options = options
        # A static graph finds unused parameters in its first step.
        self._is_finding_unused = options.find_unused_parameters is True and not options.static_graph
        self._may_find_unused = options.find_unused_parameters == "auto" and not options.static_graph
        self._reduction = ReducedPrecision.from_options(options)
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

    def exclude_rank(self, *, is_excluded: bool) -> None:
        if self._batch_norms is not None:
            self._batch_norms.exclude_rank(is_excluded=is_excluded)

    def wrap(self, module: nn.Module, training_step: TrainingStep, *, trained: Sequence[nn.Parameter]) -> TrainingStep:
        trained_ids = {id(parameter) for parameter in trained}
        names = {name for name, parameter in module.named_parameters() if id(parameter) in trained_ids}
        if not names:
            self.share_weights(module)
            return training_step
        kind = _SearchedStepModule if self._is_finding_unused else _StepModule
        step = kind(module, training_step, names)
        # Parameters that this optimizer does not train need no sync here: another optimizer's wrapped step syncs them,
        # or nobody has to.
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
            **_broadcast_option(options),
        )
        if (hook := build_comm_hook(options)) is not None:
            ddp.register_comm_hook(options.ddp_comm_state, hook)
        if isinstance(ddp, _SteadyDDP):
            ddp.build_final_buckets()
        if self._is_finding_unused:
            return partial(_run_searched, ddp)
        return partial(_run_static, ddp) if options.static_graph else ddp

    def build_sync_check(self, step: TrainingStep) -> SyncCheck | None:
        # With find_unused_parameters DDP counts missing gradients as zero and finds all of them by itself.
        ddp = _unwrap_ddp(step)
        if not isinstance(ddp, _SteadyDDP):
            return None
        return _UnusedSearch(ddp, on_found=self.find_unused) if self._may_find_unused else _UnusedError(ddp)

    def without_sync(self, step: TrainingStep) -> AbstractContextManager[object]:
        ddp = _unwrap_ddp(step)
        # The first backward pass of a static graph has to sync. A sync before the end of an accumulation window gives
        # all ranks equal gradients, so that the window's gradients stay the same.
        is_learning = self._options.static_graph and ddp is not None and not has_static_graph_reduced(ddp)
        return nullcontext() if ddp is None or is_learning else ddp.no_sync()

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        average_gradients([parameter for parameter in parameters if parameter.requires_grad], reduction=self._reduction)

    def pending_gradients(self, module: nn.Module) -> PendingGradients | None:
        return TouchedGradients(module.parameters(), average=partial(average_gradients, reduction=self._reduction))

    def share_weights(self, module: nn.Module) -> None:
        broadcast(parameter.data for parameter in module.parameters())
        self.sync_buffers(module)

    def sync_buffers(self, module: nn.Module) -> None:
        broadcast(module.buffers())


class _SteadyDDP(ReversedDDP):
    """DDP whose first step sums gradients in the order in which all later ones do.

    DDP learns in its first step in which order gradients arrive and then sorts them into other buckets. With three
    and more ranks the order of a sum depends on where in a bucket a number stands, so that the first step after a
    resume would differ in its last bits from the same step of the uninterrupted run. Here the final buckets exist
    from the start, in the order that DDP assumes initially: backwards from the module's last definition.
    """

    def build_final_buckets(self) -> None:
        """Build the final buckets before the first step. Collective."""
        push_all_parameters(self)
        rebuild_buckets(self)

    def unused_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the last backward pass has not reached.

        The reduction of the buckets with such parameters is incomplete then, and other ranks may wait in it.
        """
        try:
            # DDP itself makes this check at the start of the next forward pass, when other ranks may have gone on to
            # another collective.
            rebuild_buckets(self)
        except RuntimeError as error:
            match = _MISSING.search(str(error))
            if match is None:
                raise
            return [self.synced_parameters[int(index)] for index in match[1].split()]
        return []

    def join_names(self, parameters: Iterable[nn.Parameter]) -> str:
        unused_ids = {id(parameter) for parameter in parameters}
        return ", ".join(name for name, parameter in self.module.named_trained() if id(parameter) in unused_ids)


_MISSING = re.compile(r"Expected to have finished reduction.*did not receive grad for rank \d+:([ \d]+)", re.DOTALL)
"""Pattern of torch's error for a backward pass that left out parameters, whose indices it captures."""


class _StepModule(nn.Module):
    """Module whose forward is the user's training_step, for DDP to wrap."""

    def __init__(self, module: nn.Module, training_step: TrainingStep, trained: set[str]) -> None:
        super().__init__()
        self.module = module
        self.trained = trained
        self._training_step = training_step

    def forward(self, *args: Any) -> Any:
        outputs = self._training_step(*args)
        return ZeroLoss(loss=self._build_zero_loss()) if outputs is None else outputs

    def named_trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if name in self.trained)

    def _build_zero_loss(self) -> Tensor:
        zeros = [parameter.sum() * 0.0 for _, parameter in self.named_trained()]
        return sum(zeros[1:], zeros[0])


class _SearchedStepModule(_StepModule):
    """Step module whose outputs DDP can search for tensors.

    DDP looks into lists and dicts, but not into other mappings such as step results.
    """

    def forward(self, *args: Any) -> Any:
        outputs = super().forward(*args)
        tensors = [value for value in outputs.values() if isinstance(value, Tensor)] if _is_mapping(outputs) else []
        return [outputs, tensors]


def _is_mapping(outputs: Any) -> bool:
    return isinstance(outputs, Mapping) and not isinstance(outputs, dict)


def _run_searched(ddp: DistributedDataParallel, *args: Any) -> Any:
    return ddp(*args)[0]


def _broadcast_option(options: DDPStrategy) -> dict[str, Any]:
    if options.broadcast_buffers:
        return {}
    # torch 2.13 warns of the older name.
    is_renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if is_renamed else "broadcast_buffers": False}


def _run_static(ddp: DistributedDataParallel, *args: Any) -> Any:
    outputs = ddp(*args)
    if not has_static_graph_reduced(ddp) and isinstance(outputs, Mapping) and type(outputs) is not dict:
        # DDP starts its first reduction from the tensors that forward returns, and looks into lists and dicts only.
        for value in outputs.values():
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(partial(_reduce_at_the_end, ddp))
    return outputs


def _reduce_at_the_end(ddp: DistributedDataParallel, gradient: Tensor) -> None:
    if not has_static_graph_reduced(ddp):
        queue_static_graph_reduction(ddp)


def _unwrap_ddp(step: TrainingStep) -> DistributedDataParallel | None:
    """Return the DDP module that a wrapped step calls; None if the step is the user's own."""
    ddp = step.args[0] if isinstance(step, partial) and step.args else step
    return ddp if isinstance(ddp, DistributedDataParallel) else None


class _UnusedError:
    """Sync check that raises an error where the loss does not depend on a parameter.

    It raises on this rank; the other ranks may wait in the reduction until the driver ends them.
    """

    def __init__(self, ddp: _SteadyDDP) -> None:
        self._ddp = ddp

    def __call__(self) -> bool:
        if unused := self._ddp.unused_parameters():
            raise ModuleError(
                f"the loss does not depend on {self._ddp.join_names(unused)}, whose gradient the other workers wait "
                f"for: use it, freeze it (requires_grad_(False)), leave it out of the optimizer, or pass {_FIND_UNUSED}"
            )
        return False

    def is_renewal_due(self) -> bool:
        return False


class _UnusedSearch:
    """Sync check that counts parameters as zero where the loss does not depend on them.

    Such a parameter has no gradient if no rank has one for it, as in a single process.

    All ranks compare their unused parameters after the first step: if there are any, steps are wrapped again so that
    DDP searches for such parameters itself. In a later step a rank cannot tell the others at once that it has an
    unused parameter, as they do not expect a message. It completes the reduction that they wait in, and the ranks
    compare again at the end of the epoch.
    """

    def __init__(self, ddp: _SteadyDDP, *, on_found: Callable[[], None]) -> None:
        self._ddp = ddp
        self._on_found = on_found
        self._is_first = True
        self._unused: list[nn.Parameter] = []
        """Unused parameters on this rank since the first step."""

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
        flag = torch.tensor(float(bool(self._unused)), device=self._ddp.synced_parameters[0].device)
        dist.all_reduce(flag)
        if flag.item() == 0:
            return False
        self._on_found()
        return True

    def _agree(self, unused: list[nn.Parameter]) -> bool:
        """Compare the unused parameters of all ranks after the first step. Collective."""
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
        if unused_on_any := [parameter for parameter in parameters if num_ranks[id(parameter)] > 0]:
            self._on_found()
            self._unused = unused_on_any
            if dist.get_rank() == 0:
                self._warn(unused_on_any)
        return bool(unused_on_any)

    def _complete_alone(self, unused: list[nn.Parameter]) -> None:
        """Complete the reduction in a step in which the other ranks may have no unused parameters."""
        without = [parameter for parameter in unused if parameter.grad is None]
        self._complete(unused)
        if not self._unused:
            self._warn(unused)
        self._unused = unused
        if without:
            # A sum is negative zero only if every term is: no rank has had a gradient.
            are_left_out = torch.stack([_is_negative_zero(parameter) for parameter in without]).tolist()
            for parameter, is_left_out in zip(without, are_left_out, strict=True):
                if is_left_out:
                    parameter.grad = None

    def _complete(self, unused: list[nn.Parameter]) -> None:
        """Complete the reduction with negative zeros, which stay negative where no rank adds a gradient."""
        torch.autograd.backward(unused, [torch.full_like(parameter, -0.0) for parameter in unused])
        if self._ddp.unused_parameters():
            raise ModuleError(f"the gradients of {self._ddp.join_names(unused)} cannot be reduced: pass {_FIND_UNUSED}")

    def _warn(self, unused: list[nn.Parameter]) -> None:
        warnings.warn(
            f"the loss does not depend on {self._ddp.join_names(unused)}: training goes on, and from here on each step "
            "looks for such parameters, which takes a walk through its graph and a further small reduction. To spare "
            "it, freeze them (requires_grad_(False)) or leave them out of the optimizer; strategy='ddp' makes them an "
            f"error, and {_FIND_UNUSED} looks for them without a word",
            stacklevel=2,
        )


def _is_negative_zero(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return (torch.signbit(gradient) & (gradient == 0)).all()


_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    # Names of torch's own hooks, which torch lets run over NCCL only.
    "bf16_compress_hook": torch.bfloat16,
    "fp16_compress_hook": torch.float16,
}


def build_comm_hook(options: DDPStrategy) -> CommHook | None:
    """Build the communication hook that DDP registers; None if gradients are sent in their own precision."""
    hook, wrapper = options.ddp_comm_hook, options.ddp_comm_wrapper
    if hook is None:
        return None
    dtype = find_sent_dtype(hook)
    if dtype is not None:
        hook = partial(_average_in_16_bits, dtype)
    assert callable(hook)
    chosen = hook if wrapper is None else wrapper(hook)

    def call_hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        # DDP reads a hook's name and signature, which not every callable has.
        return chosen(state, bucket)

    return call_hook


def find_sent_dtype(hook: CommHook | str | None) -> torch.dtype | None:
    """Return the type in which a hook sends gradients; None if it is none of the casting hooks.

    Gradients that are averaged without DDP are sent in the same type.
    """
    return _DTYPES.get(hook if isinstance(hook, str) else getattr(hook, "__name__", ""))


@dataclass(frozen=True, kw_only=True, slots=True)
class ReducedPrecision:
    """Size of the buckets and type in which gradients are sent, for averages that raylit makes itself."""

    bucket_bytes: float = 25 * 2**20
    """Size in bytes up to which gradients are sent together."""
    dtype: torch.dtype | None = None
    """Type in which gradients are sent; None: their own."""

    @classmethod
    def from_options(cls, options: DDPStrategy) -> "ReducedPrecision":
        """Return the settings that DDP uses with these options."""
        size = {} if options.bucket_cap_mb is None else {"bucket_bytes": options.bucket_cap_mb * 2**20}
        return cls(**size, dtype=find_sent_dtype(options.ddp_comm_hook))

    def average(self, gradients: list[Tensor]) -> None:
        """Replace the gradients by their mean over the ranks, in place. Collective."""
        world_size = dist.get_world_size()
        for bucket in _iterate_buckets(gradients, size_bytes=self.bucket_bytes):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            # Divide before the sum, as DDP's hooks do: sums of half-precision numbers overflow early.
            sent = flat if self.dtype is None else flat.to(self.dtype).div_(world_size)
            dist.all_reduce(sent)
            mean = sent.div_(world_size) if self.dtype is None else sent.to(flat.dtype)
            for gradient, part in zip(bucket, mean.split([one.numel() for one in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


def average_gradients(
    parameters: Sequence[nn.Parameter], is_touched: Sequence[bool] | None = None, *, reduction: ReducedPrecision
) -> None:
    """Replace the gradients by their mean over the ranks, in place. Collective; same parameters on every rank.

    For `is_touched` see `materialize_gradients`.
    """
    gradients = materialize_gradients(parameters, is_touched, device=parameters[0].device) if parameters else []
    reduction.average(gradients)


def materialize_gradients(
    parameters: Sequence[nn.Parameter], is_touched: Sequence[bool] | None, *, device: torch.device
) -> list[Tensor]:
    """Return the gradients to average: those that any rank has, zeros where this rank has none. Collective.

    A parameter that no rank has touched is left out and keeps its gradient, as it would in one process.

    Args:
        parameters: The same parameters on every rank.
        is_touched: For each parameter whether its gradient has changed on this rank; None: whether it has one.
        device: Device of the tensor by which the ranks tell each other.
    """
    own = [parameter.grad is not None for parameter in parameters] if is_touched is None else is_touched
    present = torch.tensor([float(flag) for flag in own], device=device)
    dist.all_reduce(present)
    gradients = []
    for parameter, num_present in zip(parameters, present.tolist(), strict=True):
        if num_present == 0:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    return gradients


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Broadcast rank 0's values to all ranks, in place. Collective."""
    for tensor in tensors:
        copy = tensor.contiguous()
        dist.broadcast(copy, src=0)
        if copy is not tensor:
            tensor.copy_(copy)


class TouchedGradients:
    """Record of the parameters whose gradients backward passes have changed since the last average."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        average: Callable[[Sequence[nn.Parameter], Sequence[bool]], None],
    ) -> None:
        """Watch the parameters that require gradients; `average` gets them, and whether each has been touched."""
        self._average = average
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._touched: set[int] = set()
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._touch, index))
            for index, parameter in enumerate(self._parameters)
        ]

    def is_outdated(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Return whether other parameters require gradients now than at construction."""
        now = [id(parameter) for parameter in parameters if parameter.requires_grad]
        return now != [id(parameter) for parameter in self._parameters]

    def average(self) -> None:
        """Average the gradients over the ranks. Collective, unless no backward pass has run on this rank."""
        if not self._touched:
            return
        is_touched = [index in self._touched for index in range(len(self._parameters))]
        self._touched.clear()
        self._average(self._parameters, is_touched)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _touch(self, index: int, parameter: Tensor) -> None:
        self._touched.add(index)


def _average_in_16_bits(dtype: torch.dtype, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket in a 16-bit type.

    `state` is a process group; None stands for all ranks. Gradients are divided before the sum, as sums of float16
    numbers overflow early.
    """
    group = dist.group.WORLD if state is None else state
    assert group is not None
    buffer = bucket.buffer()
    sent = buffer.to(dtype).div_(group.size())
    future = dist.all_reduce(sent, group=group, async_op=True).get_future()
    return future.then(lambda arrived: buffer.copy_(arrived.value()[0]))


def _iterate_buckets(gradients: list[Tensor], *, size_bytes: float) -> Iterator[list[Tensor]]:
    """Yield gradients of one type and device together, up to the size of a bucket; a larger one comes alone."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_kind[gradient.dtype, gradient.device].append(gradient)
    for alike in by_kind.values():
        bucket: list[Tensor] = []
        num_bytes = 0
        for gradient in alike:
            if bucket and num_bytes + gradient.nbytes > size_bytes:
                yield bucket
                bucket, num_bytes = [], 0
            bucket.append(gradient)
            num_bytes += gradient.nbytes
        yield bucket
