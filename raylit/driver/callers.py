"""What the user's code around a fit does with Ray by itself, told from the code. Driver."""

import contextlib
import dis
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

_OURS = ("raylit", "ray")
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_MAX_FUNCTIONS = 1000

Functions = Iterable[tuple[CodeType, Mapping[str, Any]]]
"""Code with the globals that it sees."""


def calling_functions() -> list[FrameType]:
    """The frames of the user's that have led here, the innermost first, since Ray has called a function of the user's;
    none in a thread of the user's own."""
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package not in _OURS:
            frames.append(frame)
        elif frames and package == "ray":
            return frames
        frame = frame.f_back
    return []


def code_of(frames: Iterable[FrameType]) -> Functions:
    return [(frame.f_code, {**frame.f_globals, **frame.f_locals}) for frame in frames]


def methods_of(objects: Iterable[Any]) -> Functions:
    """Of the classes that users have written for these objects."""
    for owner in objects:
        for cls in type(owner).__mro__:
            if cls.__module__.partition(".")[0] not in (*_OURS, "torch", "builtins"):
                for member in vars(cls).values():
                    if isinstance(member, FunctionType):
                        yield member.__code__, member.__globals__


def with_helpers(functions: Functions) -> Functions:
    """And the user's functions that these speak of, as far as their names stand for something now, and those that these
    speak of, and so on."""
    found = list(functions)
    seen = {code for code, _ in found}
    for code, known in found:  # which grows meanwhile
        for function in _named(code, known):
            if function.__code__ not in seen and len(seen) < _MAX_FUNCTIONS:
                seen.add(function.__code__)
                found.append((function.__code__, {**function.__globals__, **_enclosed(function)}))
    return found


def is_calling(name: str, functions: Functions) -> bool:
    """One of the functions speaks of Ray's `name`, as in `tune.report` or after `from ray.tune import report`."""
    return any(name in names and _is_of_ray(names, known) for code, known in functions for names in [_names(code)])


def is_returning_results(frames: list[FrameType]) -> bool:
    """The function that Ray has called returns or yields something, which Tune takes for a result."""
    for frame in reversed(frames):
        if frame.f_code.co_flags & inspect.CO_GENERATOR:
            return True
        instructions = list(dis.get_instructions(frame.f_code))
        current = sum(instruction.offset <= frame.f_lasti for instruction in instructions) - 1
        returns = [index for index in range(len(instructions)) if _is_returning(instructions, index)]
        if returns != [current + 1]:
            return returns != []
        # It returns what the function returns that it is in: in the end fit's None.
    return False


def _named(code: CodeType, known: Mapping[str, Any]) -> Iterator[FunctionType]:
    """By itself, or as a member of a module, a class or an object."""
    names = _names(code) | set(code.co_varnames)
    for value in [known[name] for name in names if name in known]:
        owners = type.mro(value) if isinstance(value, type) else [value, *type(value).__mro__]
        members = [vars(owner).get(name) for owner in owners if hasattr(owner, "__dict__") for name in names]
        yield from (each for each in [value, *members] if isinstance(each, FunctionType) and _is_users(each))


def _is_users(function: FunctionType) -> bool:
    """Neither of ours nor of a library."""
    path = function.__code__.co_filename
    is_installed = path.startswith(_LIBRARIES) or path.startswith("<frozen")
    return not is_installed and str(function.__module__).partition(".")[0] not in _OURS


def _enclosed(function: FunctionType) -> dict[str, Any]:
    """What it knows of the functions that it is in."""
    known = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not set yet
            known[name] = cell.cell_contents
    return known


def _is_returning(instructions: list[dis.Instruction], index: int) -> bool:
    """Something else than None."""
    name = instructions[index].opname
    if name == "RETURN_CONST":
        return instructions[index].argval is not None
    before = instructions[index - 1]
    return name == "RETURN_VALUE" and not (before.opname == "LOAD_CONST" and before.argval is None)


def _names(code: CodeType) -> set[str]:
    """Also those in functions inside it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return {*code.co_names, *code.co_freevars, *(name for each in inner for name in _names(each))}


def _is_of_ray(names: set[str], known: Mapping[str, Any]) -> bool:
    """Something of Ray's is imported under one of the names, inside the function or outside."""
    return any(name.partition(".")[0] == "ray" or _package(known.get(name)) == "ray" for name in names)


def _package(value: Any) -> str:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return str(name).partition(".")[0]
