"""Summary: a module's layers with their parameters, in plain values that cross to the driver. Both sides."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from raylit.text_table import draw_table, fitting_widths

Size = list[Any] | str
"""A tensor's shape, or nested lists of them; "?" for what has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A submodule."""

    name: str
    kind: str
    num_parameters: int
    is_training: bool
    in_size: Size | None = None
    """Of its first call with the example input; None without one."""
    out_size: Size | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Layers down to a depth, and totals of the whole module. Shared parameters count once in the totals."""

    layers: tuple[Layer, ...]
    num_trainable: int
    num_frozen: int
    size_bytes: int
    has_lazy_parameters: bool = False
    """Some take their shape from the first batch and are not counted."""
    has_sizes: bool = False

    @property
    def num_parameters(self) -> int:
        return self.num_trainable + self.num_frozen

    def __str__(self) -> str:
        header = ["", "Name", "Type", "Params", "Mode", *(["In sizes", "Out sizes"] if self.has_sizes else [])]
        rows = [
            [
                str(index),
                layer.name,
                layer.kind,
                _in_words(layer.num_parameters),
                "train" if layer.is_training else "eval",
                *([_shown(layer.in_size), _shown(layer.out_size)] if self.has_sizes else []),
            ]
            for index, layer in enumerate(self.layers)
        ]
        totals = [
            (_in_words(self.num_trainable), "trainable parameters"),
            (_in_words(self.num_frozen), "non-trainable parameters"),
            (_in_words(self.num_parameters), "parameters in all"),
            (f"{self.size_bytes / 1e6:,.3f}", "MB of parameters"),
        ]
        lines = draw_table(header, rows, fitting_widths(header, rows)) if rows else []
        lines += [f"{number:<10} {what}" for number, what in totals]
        if self.has_lazy_parameters:
            lines.append("Lazy parameters, whose shape the first batch gives, are not counted")
        return "\n".join(lines)


def summarize(module: nn.Module, *, max_depth: int = 1) -> Summary:
    """`max_depth`: how deep below the module layers are listed; 0 only counts, -1 lists all of them.

    Where the module has an `example_input_array`, it is run once in eval mode for the layers' sizes.
    """
    listed = [
        (name, child)
        for name, child in module.named_modules()
        if name and (max_depth < 0 or name.count(".") < max_depth)
    ]
    example = getattr(module, "example_input_array", None)
    sizes = _sizes(module, listed, example) if example is not None and listed else {}
    parameters = list(module.parameters())
    counted = [parameter for parameter in parameters if not isinstance(parameter, UninitializedParameter)]
    return Summary(
        layers=tuple(_layer(name, child, sizes.get(name, (None, None))) for name, child in listed),
        num_trainable=sum(parameter.numel() for parameter in counted if parameter.requires_grad),
        num_frozen=sum(parameter.numel() for parameter in counted if not parameter.requires_grad),
        size_bytes=sum(parameter.numel() * parameter.element_size() for parameter in counted),
        has_lazy_parameters=len(counted) < len(parameters),
        has_sizes=example is not None,
    )


def _shown(size: Size | None) -> str:
    """A scalar's is [], which is no unknown one."""
    return "?" if size is None else str(size)


def _layer(name: str, child: nn.Module, sizes: tuple[Size | None, Size | None]) -> Layer:
    return Layer(
        name=name,
        kind=type(child).__name__,
        num_parameters=sum(p.numel() for p in child.parameters() if not isinstance(p, UninitializedParameter)),
        is_training=child.training,
        in_size=sizes[0],
        out_size=sizes[1],
    )


def _sizes(
    module: nn.Module, listed: list[tuple[str, nn.Module]], example: Any
) -> dict[str, tuple[Size | None, Size | None]]:
    """Of each layer's first call."""
    seen: dict[str, tuple[Size | None, Size | None]] = {}

    def watch(name: str) -> Any:
        def note(_: nn.Module, inputs: Any, output: Any) -> None:
            seen.setdefault(name, (_size(inputs[0] if len(inputs) == 1 else list(inputs)), _size(output)))

        return note

    handles = [child.register_forward_hook(watch(name)) for name, child in listed]
    try:
        with _evaluating(module):
            _call(module, example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; it leaves modes and random numbers as they were."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for child, is_training in modes:
            child.training = is_training


def _call(module: nn.Module, example: Any) -> Any:
    """A tuple holds positional arguments, a dict keywords."""
    like = next(module.parameters(), None)
    example = example if like is None else trace_to_parameters(example, like)
    if isinstance(example, (tuple, list)):
        return module(*example)
    return module(**example) if isinstance(example, dict) else module(example)


def trace_to_parameters(value: Any, like: Tensor) -> Any:
    """To the device of the weights and, where both are floating, to their type."""
    if isinstance(value, Tensor):
        is_floating = value.is_floating_point() and like.is_floating_point()
        return value.to(like.device, like.dtype if is_floating else value.dtype)
    if isinstance(value, (tuple, list)):
        return [trace_to_parameters(item, like) for item in value]
    return {key: trace_to_parameters(item, like) for key, item in value.items()} if isinstance(value, dict) else value


def _size(value: Any) -> Size:
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, (tuple, list)):
        return [_size(item) for item in value]
    return [_size(item) for item in value.values()] if isinstance(value, dict) else "?"


def _in_words(number: int) -> str:
    """Three digits and a unit: 1.2 K."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
