"""Observe, repeat and undo what torch's compiler does in a process. Driver and worker.

Written against torch 2.13, tested with torch 2.9.1 too. The compiler takes seconds to import, so nothing here imports
it before a function that is only called where something is compiled.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from raylit.compat.private_names import describe_missing, read_private
from raylit.compat.torch_core import get_call, get_compiled_call, set_compiled_call

_COMPILER = "torch._dynamo"
_FEATURE = "torch.compile"

Compilations = Mapping[str, Any]
"""By submodule name ("" for the module itself), torch's function that compiles a callable with the user's options."""


# Compiled modules, in a form that can be sent to workers


def unwrap_compiled(model: Any) -> tuple[Any, Compilations]:
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


def unwrap_optimized(model: Any) -> tuple[nn.Module, Any] | None:
    """Return the module inside one that `torch.compile` returned, and the function that compiles it the same way.

    Returns None if `model` is not such a module.
    """
    original = getattr(model, "_orig_mod", None)
    return None if original is None else (original, read_private(model, "dynamo_ctx", feature=_FEATURE))


def read_compiler(module: nn.Module) -> Any:
    """Return the function with which `module.compile()` compiled a module's call; None if it is not compiled.

    Pickling a module drops that, and only the closure of the compiled call knows how it was done.
    """
    call: Any = get_compiled_call(module)
    if call is None:
        return None
    names, cells = call.__code__.co_freevars, call.__closure__ or ()
    values = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
    if "self" not in values:
        raise describe_missing(call, "__closure__['self']", feature="a module that module.compile() has compiled")
    return values["self"]


# The compiler of this process


def reset_compiler() -> None:
    """Forget what has been compiled in this process; do nothing if the compiler was never imported."""
    if _COMPILER in sys.modules:
        torch.compiler.reset()


def isolate_script_globals(module: nn.Module) -> None:
    """Have the compiler read the globals of classes from the user's script in their own scope.

    The compiler looks up the globals of a function that it inlines in the module which they name. For definitions in
    the user's script that is `__main__`, which on a worker is another program. If the name of a scope begins as that
    of named tuples does, the compiler takes it for no module's and reads the scope itself.
    """
    for kind in {kind for part in module.modules() for kind in type(part).__mro__}:
        for function in vars(kind).values():
            scope = getattr(function, "__globals__", None)
            if isinstance(scope, dict) and "__name__" in scope and not _is_scope_of_module(scope):
                scope["__name__"] = "namedtuple_raylit"


def add_compilation_callbacks(*, on_start: Callable[[Any], None], on_end: Callable[[Any], None]) -> None:
    """Register functions that are called at the start and at the end of each compilation.

    At the start torch has recorded the compilations before it.
    """
    callbacks = _import_callbacks()
    read_private(callbacks, "register_start_callback", feature=_FEATURE)(on_start)
    read_private(callbacks, "register_end_callback", feature=_FEATURE)(on_end)


def remove_compilation_callbacks(*, on_start: Callable[[Any], None], on_end: Callable[[Any], None]) -> None:
    """Undo `add_compilation_callbacks`; do nothing if the functions are not registered."""
    callbacks = _import_callbacks()
    if on_start in read_private(callbacks, "start_callbacks", feature=_FEATURE):
        callbacks.remove_start_callback(on_start)
    if on_end in read_private(callbacks, "end_callbacks", feature=_FEATURE):
        callbacks.remove_end_callback(on_end)


def list_compilations() -> list[Any]:
    """Return torch's records of the latest compilations, the oldest first.

    Each has `recompile_reason`, `co_name`, `co_filename` and `co_firstlineno`.
    """
    import torch._dynamo.utils as dynamo_utils

    return list(read_private(dynamo_utils, "get_compilation_metrics", feature=_FEATURE)())


def _import_callbacks() -> Any:
    import torch._dynamo.callback as dynamo_callback

    return read_private(dynamo_callback, "callback_handler", feature=_FEATURE)


def _is_scope_of_module(scope: dict[str, Any]) -> bool:
    module = sys.modules.get(scope["__name__"])
    return module is not None and vars(module) is scope
