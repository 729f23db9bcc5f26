"""Choice of the modules that FSDP wraps and of those whose activations are recomputed. Worker."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from raylit.errors import ConfigError

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
