"""A module in formats that need no raylit to run: ONNX and TorchScript. Driver."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from raylit.errors import ConfigError, RaylitError
from raylit.protocol.summary import trace_to_parameters

_ONNX_PACKAGES = ("onnx", "onnxscript")
_UNTYPED = ("_view", "_hparams", "_hparams_initial")


def to_onnx(module: nn.Module, file: Any, *, sample: Any, **options: Any) -> Any:
    """torch.onnx.export in eval mode without gradients; returns what that does.

    RaylitError: a package that it needs is missing. ConfigError: there is no input to trace with.
    """
    sample = sample_of(module, sample, what="to_onnx(input_sample=...)")
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RaylitError(f"to_onnx needs packages that are not installed: pip install {' '.join(missing)}")
    with evaluating(module), torch.no_grad():
        if isinstance(sample, dict):
            options["kwargs"], sample = sample, ()
        return torch.onnx.export(module, sample if isinstance(sample, tuple) else (sample,), file, **options)


def to_torchscript(
    module: nn.Module,
    file: str | os.PathLike[str] | None,
    *,
    method: Literal["script", "trace"],
    example: Any,
    **options: Any,
) -> Any:
    """The module as TorchScript, in eval mode, also saved to `file` where one is given."""
    if method not in ("script", "trace"):
        raise ConfigError(f"to_torchscript(method={method!r}): must be 'script' or 'trace'")
    with evaluating(module), torch.no_grad():
        if method == "script":
            scripted = torch.jit.script(module, **options)
        else:
            sample = sample_of(module, example, what="to_torchscript(example_inputs=...)")
            scripted = torch.jit.trace(module, sample, **options)
    if file is not None:
        torch.jit.save(scripted, os.fspath(file))
    return scripted


def sample_of(module: nn.Module, sample: Any, *, what: str) -> Any:
    """What to trace with: `sample`, else the `example_input_array`, where the weights are. `what`: how to give one."""
    if sample is None:
        sample = getattr(module, "example_input_array", None)
    if sample is None:
        raise ConfigError(f"{type(module).__name__} has no example_input_array to export with: set it, or pass {what}")
    like = next(module.parameters(), None)
    return sample if like is None else trace_to_parameters(sample, like)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, without what TorchScript has no type for. It reads every property, also those that it leaves out: a
    stand-in for the run keeps them from raising."""
    modes = [(child, child.training) for child in module.modules()]
    own = {name: value for name, value in module.__dict__.items() if name in _UNTYPED}
    module.eval()
    module.__dict__.update(dict.fromkeys(_UNTYPED, ""))
    try:
        yield
    finally:
        for name in _UNTYPED:
            del module.__dict__[name]
        module.__dict__.update(own)
        for child, is_training in modes:
            child.training = is_training
