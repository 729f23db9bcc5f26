"""Initialization of a model built on the meta device, part by part, as a plain build would draw it. Worker."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from raylit.compat.torch_core import find_reset
from raylit.errors import ModuleError

_ADVICE = (
    "With strategy='fsdp' configure_model builds on the meta device, where nothing has numbers, and each part is "
    "initialised by its reset_parameters()"
)


def is_meta(module: nn.Module, *, recurse: bool = True) -> bool:
    """Return whether some parameter or buffer of the module is on the meta device."""
    tensors = [*module.parameters(recurse), *module.buffers(recurse)]
    return any(tensor.is_meta for tensor in tensors)


class BuildOrder:
    """Record of the order in which modules are constructed, kept while `recording` is entered."""

    def __init__(self) -> None:
        self._times: dict[nn.Module, int] = {}
        self.owners: dict[nn.Parameter, nn.Module] = {}
        """Module to which a parameter was assigned first."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record constructions in the context."""
        hooks = (
            torch_module.register_module_parameter_registration_hook(self._note),
            torch_module.register_module_buffer_registration_hook(self._note),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def replace(self, modules: Mapping[nn.Module, nn.Module]) -> None:
        """Give replacements of modules the place of the originals in the order."""
        for own, other in modules.items():
            if own in self._times:
                self._times[other] = self._times[own]

    def sort_modules(self, module: nn.Module) -> list[nn.Module]:
        """Return every module once, after the parts that it is made of.

        Modules whose construction was not recorded, such as copies of others, come last.
        """
        end_times: dict[nn.Module, float] = {}

        def walk(part: nn.Module) -> float:
            if part not in end_times:
                end_times[part] = 0.0  # set first, for the case that it is a part of itself
                times = [walk(child) for child in part.children()]
                del end_times[part]
                has_own = bool([*part.parameters(recurse=False), *part.buffers(recurse=False)])
                own = self._times.get(part, math.inf) if has_own else 0.0
                end_times[part] = max([own, *times])
            return end_times[part]

        walk(module)
        return sorted(end_times, key=lambda part: end_times[part])

    def _note(self, module: nn.Module, name: str, value: object) -> None:
        self._times.setdefault(module, len(self._times))
        if isinstance(value, nn.Parameter):
            self.owners.setdefault(value, module)


class MetaInitializer:
    """Initializer of modules on the meta device, in the order in which they were built.

    The random generator then draws for each module what it would draw in a plain build whose constructors end with
    `reset_parameters`. Numbers are drawn on the CPU, so that they are the same whatever the device.
    """

    def __init__(self, module: nn.Module, *, owners: dict[nn.Parameter, nn.Module]) -> None:
        uses = Counter(parameter for part in module.modules() for _, parameter in _own_parameters(part))
        self._shared = {parameter for parameter, num_uses in uses.items() if num_uses > 1}
        self._materialized: dict[nn.Parameter, nn.Parameter] = {}
        """Real parameter for each shared parameter on the meta device, so that they stay shared."""
        self._owners = owners
        """Module whose constructor made a parameter, and which therefore initializes it."""
        self._touched: set[nn.Module] = set()
        self._sharded: set[nn.Module] = set()

    def materialize(self, module: nn.Module) -> None:
        """Initialize the module's own parameters and buffers.

        Raises:
            ModuleError: the module has no `reset_parameters`, or its parts are sharded already.
        """
        is_own = is_meta(module, recurse=False)
        parts = set(module.children())
        if not is_own and not parts & self._touched:
            return
        self._touched.add(module)
        reset = find_reset(module)
        if reset is None:
            if is_own:
                raise ModuleError(
                    f"{type(module).__name__} has {_join_meta_names(module)} but no reset_parameters(). {_ADVICE}: "
                    f"define it in {type(module).__name__}, or build real tensors with FSDPStrategy(empty_init=False)"
                )
            return
        if any(part in self._sharded for part in module.modules()):
            raise ModuleError(
                f"{type(module).__name__}.reset_parameters would initialise parts that are sharded by then. "
                f"{_ADVICE}, after which blocks are sharded: initialise each part in its own reset_parameters"
            )
        self._reset(module, reset)

    def note_sharded(self, module: nn.Module) -> None:
        """Record that the module is sharded, so that nothing can initialize it any more."""
        self._sharded.add(module)

    def _reset(self, module: nn.Module, reset: Callable[[], object]) -> None:
        shared: dict[str, nn.Parameter] = {}
        fresh: dict[str, Tensor] = {}
        for name, parameter in _own_parameters(module):
            if not parameter.is_meta:
                continue
            own = nn.Parameter(_build_unwritten(parameter), requires_grad=parameter.requires_grad)
            if parameter in self._shared:
                real = self._materialized.setdefault(parameter, own)
                if self._owners.setdefault(parameter, module) is module:
                    own = real
                else:
                    # These numbers are drawn and dropped, as in a plain build, where the shared parameter replaces them
                    # later.
                    own = nn.Parameter(_build_unwritten(parameter)) if own is real else own
                    shared[name] = real
            fresh[name] = own
            setattr(module, name, own)
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            if buffer.is_meta:
                fresh[name] = _build_unwritten(buffer)
                setattr(module, name, fresh[name])
        reset()
        if forgotten := [name for name in fresh if _is_unwritten(getattr(module, name))]:
            raise ModuleError(
                f"{type(module).__name__}.reset_parameters leaves {', '.join(forgotten)} without numbers. {_ADVICE}: "
                "initialise them there, or make them with device='cpu'"
            )
        for name, real in shared.items():
            setattr(module, name, real)


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False, remove_duplicate=False))


def _build_unwritten(tensor: Tensor) -> Tensor:
    """Return a CPU tensor filled with the mark of values that were never written."""
    empty = torch.empty_like(tensor, device="cpu")
    with torch.no_grad():
        return empty.fill_(_unwritten_mark(tensor.dtype))


def _unwritten_mark(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 0 if dtype == torch.bool else torch.iinfo(dtype).min


def _is_unwritten(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or tensor.dtype in (torch.bool, torch.uint8):
        return False
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return bool(tensor.isnan().all())
    return bool((tensor == torch.iinfo(tensor.dtype).min).all())


def _join_meta_names(module: nn.Module) -> str:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return ", ".join(name for name, tensor in own if tensor.is_meta)
