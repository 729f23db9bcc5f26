"""Compilation by `torch.compile` and `module.compile`, in a form that can be sent to workers. Driver and workers."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from raylit.compat.torch_dynamo import read_compiler, unwrap_optimized
from raylit.compat.torch_module import get_call, get_compiled_call, set_compiled_call

Compilations = Mapping[str, Any]
"""By submodule name ("" for the module itself), torch's function that compiles a callable with the user's options."""


def unwrap(model: Any) -> tuple[Any, Compilations]:
    """Return the module inside the OptimizedModule that `torch.compile` returns, and how to compile it again.

    The second value also contains the submodules that were compiled in place.
    """
    if (optimized := unwrap_optimized(model)) is None:
        return model, _find_compiled_parts(model)
    original, compiler = optimized
    return original, {**_find_compiled_parts(original), "": compiler}


def compile_again(module: nn.Module, compilations: Compilations) -> list[nn.Module]:
    """Compile the parts that are not compiled in this process, and return them.

    Compilation itself happens at the first call.
    """
    parts = []
    for name, compiling in compilations.items():
        part = module.get_submodule(name)
        if get_compiled_call(part) is None:
            set_compiled_call(part, compiling(get_call(part)))
            parts.append(part)
    return parts


def drop_compiled(parts: list[nn.Module]) -> None:
    """Turn the parts back into ordinary modules."""
    for part in parts:
        set_compiled_call(part, None)


def _find_compiled_parts(module: Any) -> dict[str, Any]:
    """Return the compilers of the submodules that were compiled in place, which pickling drops."""
    if not isinstance(module, nn.Module):
        return {}
    compilers = {name: read_compiler(part) for name, part in module.named_modules()}
    return {name: compiler for name, compiler in compilers.items() if compiler is not None}
