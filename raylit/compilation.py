"""Compiled modules: what `torch.compile` and `module.compile` have done, in a form that travels. Both sides."""

from collections.abc import Mapping
from typing import Any

from torch import nn

Compilations = Mapping[str, Any]
"""By the submodule's name ("": the module itself): torch's function that compiles a callable as the user asked for."""


def unwrapped(model: Any) -> tuple[Any, Compilations]:
    """A module out of the OptimizedModule that `torch.compile` returns, and how to compile it and its parts again."""
    original = getattr(model, "_orig_mod", None)
    if original is None:
        return model, _of_parts(model)
    return original, {**_of_parts(original), "": model.dynamo_ctx}


def compile_again(module: nn.Module, compilations: Compilations) -> list[nn.Module]:
    """Compile what is not compiled here; returns those parts. Nothing is compiled before its first call."""
    parts = []
    for name, compiling in compilations.items():
        part = module.get_submodule(name)
        if part._compiled_call_impl is None:
            part._compiled_call_impl = compiling(part._call_impl)
            parts.append(part)
    return parts


def drop_compiled(parts: list[nn.Module]) -> None:
    """The ordinary modules that they were."""
    for part in parts:
        part._compiled_call_impl = None


def _of_parts(module: Any) -> dict[str, Any]:
    """Of those that have been compiled in place. Pickling drops that, and only the closure knows how it was done."""
    if not isinstance(module, nn.Module):
        return {}
    compiled = {name: part._compiled_call_impl for name, part in module.named_modules()}
    return {name: _closure(call)["self"] for name, call in compiled.items() if call is not None}


def _closure(function: Any) -> dict[str, Any]:
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
