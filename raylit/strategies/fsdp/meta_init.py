"""From a model on the meta device to numbers: part by part, those that a plain build would have drawn. Worker."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from raylit.compat.torch_module import find_reset
from raylit.errors import ModuleError

_ADVICE = (
    "With strategy='fsdp' configure_model builds on the meta device, where nothing has numbers, and each part is "
    "initialised by its reset_parameters()"
)


def is_meta(module: nn.Module, *, recurse: bool = True) -> bool:
    tensors = [*module.parameters(recurse), *module.buffers(recurse)]
    return any(tensor.is_meta for tensor in tensors)


class BuildOrder:
    """Knows in which order modules are constructed while it is recording."""

    def __init__(self) -> None:
        self._times: dict[nn.Module, int] = {}
        self.owners: dict[nn.Parameter, nn.Module] = {}
        """Which module a parameter was given to first."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        hooks = (
            torch_module.register_module_parameter_registration_hook(self._note),
            torch_module.register_module_buffer_registration_hook(self._note),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def exchange(self, modules: Mapping[nn.Module, nn.Module]) -> None:
        """Others have taken the place of some."""
        for own, other in modules.items():
            if own in self._times:
                self._times[other] = self._times[own]

    def over(self, module: nn.Module) -> list[nn.Module]:
        """Every module once, after the parts that it is made of; last those of which nothing is known, such as copies
        of others."""
        ended: dict[nn.Module, float] = {}

        def walk(part: nn.Module) -> float:
            if part not in ended:
                ended[part] = 0.0  # in its place should it be a part of itself
                times = [walk(child) for child in part.children()]
                del ended[part]
                has_own = bool([*part.parameters(recurse=False), *part.buffers(recurse=False)])
                own = self._times.get(part, math.inf) if has_own else 0.0
                ended[part] = max([own, *times])
            return ended[part]

        walk(module)
        return sorted(ended, key=lambda part: ended[part])

    def _note(self, module: nn.Module, name: str, value: object) -> None:
        self._times.setdefault(module, len(self._times))
        if isinstance(value, nn.Parameter):
            self.owners.setdefault(value, module)


class MetaInitializer:
    """Gives modules their numbers, in the order in which they were built: the generator then draws for each what it
    would draw in a plain build whose constructors end with `reset_parameters`.

    Numbers are drawn on the CPU: the same ones whatever the device.
    """

    def __init__(self, module: nn.Module, *, owners: dict[nn.Parameter, nn.Module]) -> None:
        uses = Counter(parameter for part in module.modules() for _, parameter in _own_parameters(part))
        self._shared = {parameter for parameter, num_uses in uses.items() if num_uses > 1}
        self._made: dict[nn.Parameter, nn.Parameter] = {}
        """What shared parameters on the meta device have become: they stay shared."""
        self._owners = owners
        """Whose constructor has made a parameter, and so initialises it."""
        self._touched: set[nn.Module] = set()
        self._sharded: set[nn.Module] = set()

    def materialize(self, module: nn.Module) -> None:
        """Its own parameters and buffers. ModuleError: nothing says what their numbers are."""
        is_own = is_meta(module, recurse=False)
        parts = set(module.children())
        if not is_own and not parts & self._touched:
            return
        self._touched.add(module)
        reset = find_reset(module)
        if reset is None:
            if is_own:
                raise ModuleError(
                    f"{type(module).__name__} has {_tensors_named(module)} but no reset_parameters(). {_ADVICE}: "
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
        """From now on nothing can initialise it."""
        self._sharded.add(module)

    def _reset(self, module: nn.Module, reset: Callable[[], object]) -> None:
        shared: dict[str, nn.Parameter] = {}
        fresh: dict[str, Tensor] = {}
        for name, parameter in _own_parameters(module):
            if not parameter.is_meta:
                continue
            own = nn.Parameter(_empty(parameter), requires_grad=parameter.requires_grad)
            if parameter in self._shared:
                made = self._made.setdefault(parameter, own)
                if self._owners.setdefault(parameter, module) is module:
                    own = made
                else:
                    # What is drawn now goes nowhere, as in a plain build, where another's takes its place later.
                    own = nn.Parameter(_empty(parameter)) if own is made else own
                    shared[name] = made
            fresh[name] = own
            setattr(module, name, own)
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            if buffer.is_meta:
                fresh[name] = _empty(buffer)
                setattr(module, name, fresh[name])
        reset()
        if forgotten := [name for name in fresh if _is_untouched(getattr(module, name))]:
            raise ModuleError(
                f"{type(module).__name__}.reset_parameters leaves {', '.join(forgotten)} without numbers. {_ADVICE}: "
                "initialise them there, or make them with device='cpu'"
            )
        for name, made in shared.items():
            setattr(module, name, made)


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False, remove_duplicate=False))


def _empty(tensor: Tensor) -> Tensor:
    """Of numbers that say that nobody has written them."""
    empty = torch.empty_like(tensor, device="cpu")
    with torch.no_grad():
        return empty.fill_(_unwritten(tensor.dtype))


def _unwritten(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 0 if dtype == torch.bool else torch.iinfo(dtype).min


def _is_untouched(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or tensor.dtype in (torch.bool, torch.uint8):
        return False
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return bool(tensor.isnan().all())
    return bool((tensor == torch.iinfo(tensor.dtype).min).all())


def _tensors_named(module: nn.Module) -> str:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return ", ".join(name for name, tensor in own if tensor.is_meta)
