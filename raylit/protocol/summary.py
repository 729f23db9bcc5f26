"""Summary: a module's layers with their parameters, in plain values for the driver. Driver and workers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from raylit.text_table import draw_table, fitting_widths

Size = list[Any] | str
"""A tensor's shape, or nested lists of shapes; "?" for a value without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A submodule's row in the summary."""

    name: str
    kind: str
    num_parameters: int
    is_training: bool
    in_size: Size | None = None
    """Input size of its first call with the example input; None without an example."""
    out_size: Size | None = None
    """Output size of that call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Layers down to a depth, and totals of the whole module. Shared parameters count once in the totals.

    `str(summary)` draws the table.
    """

    layers: tuple[Layer, ...]
    num_trainable: int
    num_frozen: int
    size_bytes: int
    has_lazy_parameters: bool = False
    """Some parameters get their shape from the first batch and are not counted."""
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
                _format_count(layer.num_parameters),
                "train" if layer.is_training else "eval",
                *([_format_size(layer.in_size), _format_size(layer.out_size)] if self.has_sizes else []),
            ]
            for index, layer in enumerate(self.layers)
        ]
        totals = [
            (_format_count(self.num_trainable), "trainable parameters"),
            (_format_count(self.num_frozen), "non-trainable parameters"),
            (_format_count(self.num_parameters), "parameters in all"),
            (f"{self.size_bytes / 1e6:,.3f}", "MB of parameters"),
        ]
        lines = draw_table(header, rows, fitting_widths(header, rows)) if rows else []
        lines += [f"{number:<10} {what}" for number, what in totals]
        if self.has_lazy_parameters:
            lines.append("Lazy parameters, whose shape the first batch gives, are not counted")
        return "\n".join(lines)


def summarize(module: nn.Module, *, max_depth: int = 1) -> Summary:
    """Return the module's summary.

    If the module has an `example_input_array`, it is run once in eval mode to find the layers' sizes.

    Args:
        module: The module.
        max_depth: Depth of the listed layers; 0 lists none, -1 all.
    """
    children = [
        (name, child)
        for name, child in module.named_modules()
        if name and (max_depth < 0 or name.count(".") < max_depth)
    ]
    example = getattr(module, "example_input_array", None)
    sizes = _measure_sizes(module, children, example) if example is not None and children else {}
    parameters = list(module.parameters())
    initialized = [parameter for parameter in parameters if not isinstance(parameter, UninitializedParameter)]
    return Summary(
        layers=tuple(_describe_layer(name, child, sizes.get(name, (None, None))) for name, child in children),
        num_trainable=sum(parameter.numel() for parameter in initialized if parameter.requires_grad),
        num_frozen=sum(parameter.numel() for parameter in initialized if not parameter.requires_grad),
        size_bytes=sum(parameter.numel() * parameter.element_size() for parameter in initialized),
        has_lazy_parameters=len(initialized) < len(parameters),
        has_sizes=example is not None,
    )


def _format_size(size: Size | None) -> str:
    """Format a size; "?" if it is unknown. A scalar's size is []."""
    return "?" if size is None else str(size)


def _describe_layer(name: str, child: nn.Module, sizes: tuple[Size | None, Size | None]) -> Layer:
    return Layer(
        name=name,
        kind=type(child).__name__,
        num_parameters=sum(p.numel() for p in child.parameters() if not isinstance(p, UninitializedParameter)),
        is_training=child.training,
        in_size=sizes[0],
        out_size=sizes[1],
    )


def _measure_sizes(
    module: nn.Module, children: list[tuple[str, nn.Module]], example: Any
) -> dict[str, tuple[Size | None, Size | None]]:
    """Return input and output size of each layer's first call."""
    sizes: dict[str, tuple[Size | None, Size | None]] = {}

    def watch(name: str) -> Any:
        def note(_: nn.Module, inputs: Any, output: Any) -> None:
            sizes.setdefault(name, (_read_size(inputs[0] if len(inputs) == 1 else list(inputs)), _read_size(output)))

        return note

    handles = [child.register_forward_hook(watch(name)) for name, child in children]
    try:
        with _eval_mode(module):
            _call_module(module, example)
    finally:
        for handle in handles:
            handle.remove()
    return sizes


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients; restore modes and random numbers afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for child, is_training in modes:
            child.training = is_training


def _call_module(module: nn.Module, example: Any) -> Any:
    """Call the module: a tuple contains positional arguments, a dict keyword arguments."""
    like = next(module.parameters(), None)
    example = example if like is None else move_to_parameters(example, like)
    if isinstance(example, (tuple, list)):
        return module(*example)
    return module(**example) if isinstance(example, dict) else module(example)


def move_to_parameters(value: Any, like: Tensor) -> Any:
    """Move tensors to the weights' device and, if both are floating-point, to the weights' type."""
    if isinstance(value, Tensor):
        is_floating = value.is_floating_point() and like.is_floating_point()
        return value.to(like.device, like.dtype if is_floating else value.dtype)
    if isinstance(value, (tuple, list)):
        return [move_to_parameters(item, like) for item in value]
    return {key: move_to_parameters(item, like) for key, item in value.items()} if isinstance(value, dict) else value


def _read_size(value: Any) -> Size:
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, (tuple, list)):
        return [_read_size(item) for item in value]
    return [_read_size(item) for item in value.values()] if isinstance(value, dict) else "?"


def _format_count(number: int) -> str:
    """Format a number with one decimal and a unit: 1.2 K."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
