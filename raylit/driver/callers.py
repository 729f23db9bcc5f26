"""What the user's code around a fit does with Ray by itself, told from the code. Driver."""

import dis
import inspect
import sys
from collections.abc import Iterable, Mapping
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

_OURS = ("raylit", "ray")

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
    return [(frame.f_code, frame.f_globals) for frame in frames]


def methods_of(objects: Iterable[Any]) -> Functions:
    """Of the classes that users have written for these objects."""
    for owner in objects:
        for cls in type(owner).__mro__:
            if cls.__module__.partition(".")[0] not in (*_OURS, "torch", "builtins"):
                for member in vars(cls).values():
                    if isinstance(member, FunctionType):
                        yield member.__code__, member.__globals__


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
