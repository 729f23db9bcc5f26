"""Which modules FSDP wraps, and where activations are recomputed."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from raylit.errors import ConfigError

WrapPolicy = Collection[type[nn.Module]] | Callable[[nn.Module], bool]

_MIN_INFERRED_PARAMETERS = 10_000
"""A part smaller than that costs more in the latency of its collectives than it saves in memory."""


def chosen_units(module: nn.Module, policy: WrapPolicy | None) -> list[nn.Module]:
    """ConfigError: the policy fits no part of the module."""
    if policy is None:
        return list(dict.fromkeys(_repeated(module)))
    fits = policy if not isinstance(policy, Collection) else _is_one_of(policy)
    units = [part for part in module.modules() if part is not module and fits(part)]
    if not units:
        raise ConfigError(
            f"FSDPStrategy(auto_wrap_policy={_named(policy)}) fits no part of {type(module).__name__}: give the "
            "classes of its blocks, or leave it out to have repeated blocks found"
        )
    return units


def called_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts with parameters that can be called."""
    for child in module.children():
        if type(child).forward is nn.Module.forward:
            yield from called_parts(child)
        elif any(True for _ in child.parameters()):
            yield child


def check_not_shared(module: nn.Module, units: Collection[nn.Module]) -> None:
    """ConfigError: a unit shares a parameter with what is outside of it, so that neither could be gathered alone."""
    owners: dict[int, nn.Module] = {}
    for part, name, parameter in _parameters_by_unit(module, set(units), module, ""):
        owner = owners.setdefault(id(parameter), part)
        if owner is not part:
            raise ConfigError(
                f"the parameter {name} is shared by {type(owner).__name__} and {type(part).__name__}, which FSDP "
                "gathers at different times: give an auto_wrap_policy whose classes hold shared parameters together, "
                "or leave one of these two out of it"
            )


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """Members of one class of a ModuleList, ModuleDict or Sequential that has several; nothing inside of these."""
    for child in module.children():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and _is_block(child, module):
            yield child
        else:
            yield from _repeated(child)


def _is_block(child: nn.Module, container: nn.Module) -> bool:
    counts = Counter(type(one) for one in container.children())
    is_container = isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
    if is_container or counts[type(child)] < 2 or type(child).forward is nn.Module.forward:
        return False
    return sum(parameter.numel() for parameter in child.parameters()) >= _MIN_INFERRED_PARAMETERS


def _is_one_of(classes: Collection[type[nn.Module]]) -> Callable[[nn.Module], bool]:
    return lambda part: isinstance(part, tuple(classes))


def _parameters_by_unit(
    module: nn.Module, units: set[nn.Module], unit: nn.Module, prefix: str
) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for name, parameter in module.named_parameters(recurse=False):
        yield unit, f"{prefix}{name}", parameter
    for name, child in module.named_children():
        yield from _parameters_by_unit(child, units, child if child in units else unit, f"{prefix}{name}.")


def _named(policy: WrapPolicy) -> str:
    if isinstance(policy, Collection):
        return "{" + ", ".join(one.__name__ for one in policy) + "}"
    return getattr(policy, "__name__", repr(policy))


class ActivationCheckpointing:
    """Modules of some classes, whose forward runs under torch.utils.checkpoint until `restore`."""

    def __init__(self, module: nn.Module, classes: Collection[type[nn.Module]]) -> None:
        self._modules = [part for part in module.modules() if isinstance(part, tuple(classes))]
        for part in self._modules:
            # An attribute of its own: names of parameters stay, and the hooks that gather them run around it.
            part.forward = _recomputing(part.forward)

    def restore(self) -> None:
        for part in self._modules:
            del part.forward


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputed
