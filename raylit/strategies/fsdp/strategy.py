"""Fully sharded data parallelism with torch's `fully_shard`: every rank holds its shard of the state. Worker."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from raylit.compat.torch_core import BatchNormBase, compute_norms, scale_in_place
from raylit.compat.torch_fsdp import (
    clear_forward_order,
    finish_backward,
    get_state,
    initialize_root,
    iterate_all_param_groups,
)
from raylit.config import FSDPStrategy, PrecisionName
from raylit.errors import ConfigError, ModuleError
from raylit.strategies.base import PendingGradients, SyncCheck, TrainingStep
from raylit.strategies.ddp import ReducedPrecision, TouchedGradients, average_gradients, broadcast
from raylit.strategies.fsdp.meta_init import BuildOrder, MetaInitializer
from raylit.strategies.fsdp.shards import (
    MethodEntryPoints,
    ShardedScaler,
    all_gather_shards,
    build_local_state,
    build_local_value,
    forget_sharding,
    free_eagerly,
    gather_full_tensor,
    leave_on_meta,
    list_shards,
    minimize_memory,
)
from raylit.strategies.fsdp.skipped_batches import CollectiveSchedule
from raylit.strategies.sharded_state import Reader, split_parts
from raylit.strategies.single import Single
from raylit.strategies.sync_batch_norm import SyncedBatchNorms

_PIECE_BYTES = 16 * 2**20
"""Size of the pieces in which weights are gathered at the end; a single larger tensor is a piece of its own."""
_MIXED: dict[str, torch.dtype] = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class FSDP(Single):
    """Strategy that gathers parameters unit by unit around their use, and reduces gradients to the owning ranks."""

    is_forward_collective = True
    is_evaluation_collective = True
    is_sharding = True

    def __init__(self, options: FSDPStrategy, *, precision: PrecisionName, is_syncing_batch_norm: bool = False) -> None:
        self.is_gathering = options.state_dict_type == "full"
        self._options = options
        self._policy = options.mixed_precision or _build_policy(precision)
        self._order = BuildOrder()
        self._root: Any = None
        """The module, once it is sharded."""
        self._entry_points: MethodEntryPoints | None = None
        self._replicated: list[nn.Parameter] = []
        """Parameters of which every rank has the whole."""
        self._added: list[tuple[nn.Module, set[str]]] = []
        """Modules with the attributes that sharding has added to each."""
        self._checkpointing: ActivationCheckpointing | None = None
        self._is_syncing_batch_norm = is_syncing_batch_norm
        self._batch_norms: SyncedBatchNorms | None = None

    # From the user's module to shards and back

    @contextmanager
    def build_context(self) -> Iterator[None]:
        with torch.device("meta") if self._options.empty_init else nullcontext(), self._order.recording():
            yield

    def place(
        self,
        module: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        steps: Sequence[str],
        is_manual: bool,
    ) -> None:
        _check_shapes(module)
        self._is_on_cpu = device.type == "cpu"
        if self._is_on_cpu:
            free_eagerly(is_eager=True)
        self._device = device
        if self._is_syncing_batch_norm:
            self._batch_norms = SyncedBatchNorms(module, device=device)
            self._order.replace(self._batch_norms.replacements)
        units = choose_units(module, self._options.auto_wrap_policy)
        if is_manual:
            units = list(dict.fromkeys([*units, *find_callable_parts(module)]))
        check_not_shared(module, units)
        if self._options.activation_checkpointing_policy is not None:
            self._checkpointing = ActivationCheckpointing(module, self._options.activation_checkpointing_policy)
        full_precision = set(_list_affine_batch_norms(module) if self._policy.param_dtype is not None else ())
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        materializer = MetaInitializer(module, owners=self._order.owners)
        for part in self._order.sort_modules(module):
            materializer.materialize(part)
            if part in full_precision or part is module or part in units:
                _move_to_device(part, device, dtype)
                broadcast([*_own_parameters(part), *part.buffers()])
                policy = MixedPrecisionPolicy() if part in full_precision else self._policy
                whole = {one for one in _own_parameters(part) if one.ndim == 0 or (is_manual and part is module)}
                self._shard(part, mesh, policy, whole=whole, is_root=part is module)
                materializer.note_sharded(part)
        if self._is_on_cpu:
            minimize_memory(part for part in module.modules() if isinstance(part, FSDPModule))
        self._order = BuildOrder()  # it refers to the modules
        self._root = module
        self._replicated = _own_parameters(module)
        # torch warns of views in the whole model's output. The loss, which a step returns, covers what the warning is
        # about.
        sharded = type(module).__name__
        warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \({sharded}\) returned a view tensor")
        self._entry_points = MethodEntryPoints(module, steps=steps, is_manual=is_manual)

    def restore_module(self, module: nn.Module) -> None:
        if self._entry_points is None:
            return
        self._entry_points.restore()
        if self._checkpointing is not None:
            self._checkpointing.restore()
        for part, added in reversed(self._added):
            forget_sharding(part, added)
        leave_on_meta(module)
        if self._batch_norms is not None:
            self._batch_norms.restore()
        self._root, self._entry_points, self._added = None, None, []
        if self._is_on_cpu:
            free_eagerly(is_eager=False)

    def iterate_full_weights(self, module: nn.Module) -> Iterator[dict[str, Tensor]]:
        if not self._options.gather_weights:
            return
        piece: dict[str, Tensor] = {}
        size_bytes = 0
        for name, value in module.state_dict().items():
            if size_bytes + value.nbytes > _PIECE_BYTES and piece:
                yield piece
                piece, size_bytes = {}, 0
            piece[name] = gather_full_tensor(value)
            size_bytes += value.nbytes
        yield piece

    # Training

    @property
    def needs_batch_on_every_rank(self) -> bool:
        return self._batch_norms is not None and self._batch_norms.needs_batch_on_every_rank

    def exclude_rank(self, *, is_excluded: bool) -> None:
        if self._batch_norms is not None:
            self._batch_norms.exclude_rank(is_excluded=is_excluded)

    def wrap(self, module: nn.Module, training_step: TrainingStep, *, trained: Sequence[nn.Parameter]) -> TrainingStep:
        self._initialize()
        schedule = CollectiveSchedule(module, replicated=self._replicated, device=self._device)
        assert self._entry_points is not None
        return partial(self._entry_points.run_step, schedule, training_step)

    def build_scaler(self, device: torch.device) -> torch.amp.GradScaler:
        return ShardedScaler(device.type)

    def build_sync_check(self, step: TrainingStep) -> SyncCheck | None:
        return _ReducingCheck(self._reduce_rest)

    @contextmanager
    def without_sync(self, step: TrainingStep) -> Iterator[None]:
        self._root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        self._reduce_rest()

    def pending_gradients(self, module: nn.Module) -> PendingGradients | None:
        self._initialize()
        return _PendingShards(self._replicated, finish_backward=self._finish_backward)

    def sync_buffers(self, module: nn.Module) -> None:
        broadcast(module.buffers())

    def clip_gradients(
        self, parameters: Iterable[nn.Parameter], *, limit: float, algorithm: Literal["norm", "value"]
    ) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return
        if algorithm == "value":
            for shard in list_shards(gradients):
                shard.clamp_(-limit, limit)
            return
        total = torch.linalg.vector_norm(torch.stack(self.compute_norms(gradients, 2.0)))
        # The same formula as in torch's clip_grad_norm_.
        scale_in_place(list_shards(gradients), torch.clamp(limit / (total + 1e-6), max=1.0))

    def compute_norms(self, gradients: Sequence[Tensor], order: float) -> list[Tensor]:
        own = torch.stack(compute_norms(list_shards(gradients), order))
        if self._replicated and dist.get_rank() > 0:
            own *= own.new_tensor([isinstance(gradient, DTensor) for gradient in gradients])
        if math.isinf(order):
            dist.all_reduce(own, op=dist.ReduceOp.MAX)
        else:
            own = own.pow(order)
            dist.all_reduce(own)
            own = own.pow(1.0 / order)
        return list(own)

    @contextmanager
    def evaluation_context(self, *, is_inference_mode: bool) -> Iterator[None]:
        # Parameters gathered in inference mode could not be used in a later backward pass.
        with torch.no_grad():
            yield
        state = get_state(self._root)
        for group in iterate_all_param_groups(state):
            group.reshard()
        # Otherwise the next backward pass would prefetch the units that have run last here.
        clear_forward_order(state)

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ConfigError("strategy='fsdp' with LBFGS: it needs whole gradients in one process; use 'ddp'")

    # State

    def collect_state(self, state: dict[str, Any]) -> dict[str, Any]:
        collected: dict[str, Any] = all_gather_shards(state) if self.is_gathering else split_parts(state, "", {})
        return collected

    def parts(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {}
        if not self.is_gathering:
            split_parts(module.state_dict(), "state_dict", own)
            split_parts([optimizer.state_dict() for optimizer in optimizers], "optimizer_states", own)
        return own

    def load_weights(self, module: nn.Module, state_dict: Mapping[str, Any], *, read: Reader | None) -> None:
        own = module.state_dict()
        targets: dict[str, Tensor] = {}
        loaded = {
            name: build_local_value(value, own[name], f"state_dict.{name}", targets, is_in_place=True)
            for name, value in state_dict.items()
        }
        if read is not None:
            read(targets)
        module.load_state_dict(loaded)

    def load_optimizer_states(
        self, optimizers: Sequence[Optimizer], states: Sequence[dict[str, Any]], *, read: Reader | None
    ) -> None:
        targets: dict[str, Tensor] = {}
        loaded = [
            build_local_state(state, optimizer, f"optimizer_states.{index}", targets)
            for index, (optimizer, state) in enumerate(zip(optimizers, states, strict=True))
        ]
        if read is not None:
            read(targets)
        for optimizer, state in zip(optimizers, loaded, strict=True):
            optimizer.load_state_dict(state)

    # Helpers, in the order in which they are called

    def _shard(
        self,
        part: nn.Module,
        mesh: DeviceMesh,
        policy: MixedPrecisionPolicy,
        *,
        whole: set[nn.Parameter],
        is_root: bool,
    ) -> None:
        is_offloading = self._options.cpu_offload and mesh.device_type != "cpu"
        before = {module: set(vars(module)) for module in part.modules()}
        fully_shard(
            part,
            mesh=mesh,
            # None keeps the root's parameters gathered until the backward pass, which begins at once.
            reshard_after_forward=None if is_root else self._options.reshard_after_forward,
            mp_policy=policy,
            offload_policy=CPUOffloadPolicy() if is_offloading else OffloadPolicy(),
            ignored_params=whole,
        )
        self._added += [(module, set(vars(module)) - names) for module, names in before.items()]

    def _initialize(self) -> None:
        """Initialize the root before the first forward pass, when another optimizer may have frozen parameters."""
        initialize_root(get_state(self._root))

    def _reduce_rest(self) -> None:
        self._finish_backward()
        average_gradients([one for one in self._replicated if one.requires_grad], reduction=ReducedPrecision())

    def _finish_backward(self) -> None:
        """Reduce the gradients that the backward pass has left over. Collective; it does nothing if none are left.

        These are gradients accumulated without a sync, and those of a module in whose outputs torch has found no
        tensor.
        """
        finish_backward(get_state(self._root))


class _ReducingCheck:
    """Sync check that reduces what the backward pass has not reached and never has anything to report."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def __call__(self) -> bool:
        self._finish()
        return False

    def is_renewal_due(self) -> bool:
        return False


def _build_policy(precision: PrecisionName) -> MixedPrecisionPolicy:
    """Return torch's policy for a precision. Inputs are left to autocast, which runs around the step."""
    dtype = _MIXED.get(precision)
    if dtype is None:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _check_shapes(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ModuleError(
                f"strategy='fsdp' has to know how large {name} is: give its size in the place of a lazy module's, or "
                "run the module on an example before fit"
            )


def _list_affine_batch_norms(module: nn.Module) -> list[nn.Module]:
    """Return the batch norms: they take no parameters of another type than their running statistics."""
    return [part for part in module.modules() if isinstance(part, BatchNormBase) and part.affine]


def _own_parameters(part: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are not sharded yet."""
    return [parameter for parameter in part.parameters() if not isinstance(parameter, DTensor)]


def _move_to_device(part: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    for parameter in _own_parameters(part):
        parameter.data = move(parameter.data)
    for owner in part.modules():
        for name, buffer in list(owner.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(owner, name, move(buffer))


class _PendingShards:
    """Gradients of backward passes inside a step: those that torch has left to reduce and those of whole parameters."""

    def __init__(self, replicated: Sequence[nn.Parameter], *, finish_backward: Callable[[], None]) -> None:
        self._replicated = replicated
        self._finish_backward = finish_backward
        self._touched = TouchedGradients(replicated, average=partial(average_gradients, reduction=ReducedPrecision()))

    def average(self) -> None:
        self._finish_backward()
        self._touched.average()

    def is_outdated(self, parameters: Iterable[nn.Parameter]) -> bool:
        return self._touched.is_outdated(self._replicated)

    def close(self) -> None:
        self._touched.close()


WrapPolicy = Collection[type[nn.Module]] | Callable[[nn.Module], bool]

_MIN_INFERRED_PARAMETERS = 10_000
"""Size below which a part costs more in the latency of its collectives than it saves in memory."""


def choose_units(module: nn.Module, policy: WrapPolicy | None) -> list[nn.Module]:
    """Return the modules that are gathered as units: those that fit the policy, or repeated blocks by default.

    Raises:
        ConfigError: the policy fits no part of the module.
    """
    if policy is None:
        return list(dict.fromkeys(_find_repeated_blocks(module)))
    fits = policy if not isinstance(policy, Collection) else _is_one_of(policy)
    units = [part for part in module.modules() if part is not module and fits(part)]
    if not units:
        raise ConfigError(
            f"FSDPStrategy(auto_wrap_policy={_format_policy(policy)}) fits no part of {type(module).__name__}: give "
            "the classes of its blocks, or leave it out to have repeated blocks found"
        )
    return units


def find_callable_parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest parts with parameters that can be called."""
    for child in module.children():
        if type(child).forward is nn.Module.forward:
            yield from find_callable_parts(child)
        elif any(True for _ in child.parameters()):
            yield child


def check_not_shared(module: nn.Module, units: Collection[nn.Module]) -> None:
    """Check that no unit shares a parameter with a module outside of it, as neither could be gathered alone then.

    Raises:
        ConfigError: one does.
    """
    owners: dict[int, nn.Module] = {}
    for part, name, parameter in _parameters_by_unit(module, set(units), module, ""):
        owner = owners.setdefault(id(parameter), part)
        if owner is not part:
            raise ConfigError(
                f"the parameter {name} is shared by {type(owner).__name__} and {type(part).__name__}, which FSDP "
                "gathers at different times: give an auto_wrap_policy whose classes hold shared parameters together, "
                "or leave one of these two out of it"
            )


class ActivationCheckpointing:
    """Activation checkpointing of all modules of some classes, until `restore`.

    Their forward runs under torch.utils.checkpoint.
    """

    def __init__(self, module: nn.Module, classes: Collection[type[nn.Module]]) -> None:
        self._modules = [part for part in module.modules() if isinstance(part, tuple(classes))]
        for part in self._modules:
            # Set on the instance: names of parameters stay, and the hooks that gather parameters run around it.
            part.forward = _checkpoint_forward(part.forward)

    def restore(self) -> None:
        for part in self._modules:
            del part.forward


def _find_repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield children of a ModuleList, ModuleDict or Sequential that share a class, but no blocks inside of these."""
    for child in module.children():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and _is_block(child, module):
            yield child
        else:
            yield from _find_repeated_blocks(child)


def _is_block(child: nn.Module, container: nn.Module) -> bool:
    counts = Counter(type(one) for one in container.children())
    is_container = isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
    if is_container or counts[type(child)] < 2 or type(child).forward is nn.Module.forward:
        return False
    return sum(parameter.numel() for parameter in child.parameters()) >= _MIN_INFERRED_PARAMETERS


def _is_one_of(classes: Collection[type[nn.Module]]) -> Callable[[nn.Module], bool]:
    return lambda part: isinstance(part, tuple(classes))


def _format_policy(policy: WrapPolicy) -> str:
    if isinstance(policy, Collection):
        return "{" + ", ".join(one.__name__ for one in policy) + "}"
    return getattr(policy, "__name__", repr(policy))


def _parameters_by_unit(
    module: nn.Module, units: set[nn.Module], unit: nn.Module, prefix: str
) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for name, parameter in module.named_parameters(recurse=False):
        yield unit, f"{prefix}{name}", parameter
    for name, child in module.named_children():
        yield from _parameters_by_unit(child, units, child if child in units else unit, f"{prefix}{name}.")


def _checkpoint_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run_checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run_checkpointed
