"""Export of modules to formats that do not need raylit: ONNX and TorchScript. Driver."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from raylit.errors import ConfigError, RaylitError
from raylit.protocol.summary import move_to_parameters

_ONNX_PACKAGES = ("onnx", "onnxscript")
_UNTYPED = ("_view", "_hparams", "_hparams_initial")


def to_onnx(module: nn.Module, file: Any, *, sample: Any, **options: Any) -> Any:
    """Call torch.onnx.export in eval mode without gradients, and return its result.

    Raises:
        RaylitError: if a required package is missing.
        ConfigError: if there is no input to trace with.
    """
    sample = find_sample(module, sample, what="to_onnx(input_sample=...)")
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RaylitError(f"to_onnx needs packages that are not installed: pip install {' '.join(missing)}")
    with eval_mode(module), torch.no_grad():
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
    """Return the module as TorchScript, in eval mode; save it to `file` if one is given.

    Raises:
        ConfigError: if the method is unknown, or there is no input to trace with.
    """
    if method not in ("script", "trace"):
        raise ConfigError(f"to_torchscript(method={method!r}): must be 'script' or 'trace'")
    with eval_mode(module), torch.no_grad():
        if method == "script":
            script = torch.jit.script(module, **options)
        else:
            sample = find_sample(module, example, what="to_torchscript(example_inputs=...)")
            script = torch.jit.trace(module, sample, **options)
    if file is not None:
        torch.jit.save(script, os.fspath(file))
    return script


def find_sample(module: nn.Module, sample: Any, *, what: str) -> Any:
    """Return the input to trace with, on the weights' device: `sample`, else the `example_input_array`.

    Raises:
        ConfigError: if there is neither; `what` says in the message how to pass one.
    """
    if sample is None:
        sample = getattr(module, "example_input_array", None)
    if sample is None:
        raise ConfigError(f"{type(module).__name__} has no example_input_array to export with: set it, or pass {what}")
    like = next(module.parameters(), None)
    return sample if like is None else move_to_parameters(sample, like)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Run the block in eval mode, with the module's attributes hidden that TorchScript has no type for.

    TorchScript reads every property, also those that it ignores. A stand-in for the run keeps them from raising.
    """
    modes = [(child, child.training) for child in module.modules()]
    hidden = {name: value for name, value in module.__dict__.items() if name in _UNTYPED}
    module.eval()
    module.__dict__.update(dict.fromkeys(_UNTYPED, ""))
    try:
        yield
    finally:
        for name in _UNTYPED:
            del module.__dict__[name]
        module.__dict__.update(hidden)
        for child, is_training in modes:
            child.training = is_training
