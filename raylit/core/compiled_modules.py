"""Compiled modules: what `torch.compile` and `module.compile` have done, in a form that travels. Both sides."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from raylit.compat.torch_dynamo import read_compiler, unwrap_optimized
from raylit.compat.torch_module import get_call, get_compiled_call, set_compiled_call

Compilations = Mapping[str, Any]
"""By the submodule's name ("": the module itself): torch's function that compiles a callable as the user asked for."""


def unwrap(model: Any) -> tuple[Any, Compilations]:
    """A module out of the OptimizedModule that `torch.compile` returns, and how to compile it and its parts again."""
    if (optimized := unwrap_optimized(model)) is None:
        return model, _of_parts(model)
    original, compiler = optimized
    return original, {**_of_parts(original), "": compiler}


def compile_again(module: nn.Module, compilations: Compilations) -> list[nn.Module]:
    """Compile what is not compiled here; returns those parts. Nothing is compiled before its first call."""
    parts = []
    for name, compiling in compilations.items():
        part = module.get_submodule(name)
        if get_compiled_call(part) is None:
            set_compiled_call(part, compiling(get_call(part)))
            parts.append(part)
    return parts


def drop_compiled(parts: list[nn.Module]) -> None:
    """The ordinary modules that they were."""
    for part in parts:
        set_compiled_call(part, None)


def _of_parts(module: Any) -> dict[str, Any]:
    """Of those that have been compiled in place, which pickling drops."""
    if not isinstance(module, nn.Module):
        return {}
    compilers = {name: read_compiler(part) for name, part in module.named_modules()}
    return {name: compiler for name, compiler in compilers.items() if compiler is not None}
