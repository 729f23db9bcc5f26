"""Precision: autocast, type of weights, gradient scaler. Worker."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from raylit.config import PrecisionName

_MIXED: dict[str, torch.dtype] = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
_TRUE: dict[str, torch.dtype] = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}


@dataclass(frozen=True, slots=True)
class Precision:
    """Numeric types of weights and computation on one device."""

    weights_dtype: torch.dtype | None
    """Type to which floating-point weights and batches are converted; None keeps their types."""
    autocast_dtype: torch.dtype | None
    """Type of torch.autocast; None for no autocast."""
    scaler: torch.amp.GradScaler | None
    device_type: str

    @property
    def is_plain(self) -> bool:
        """True if a step needs no context."""
        return self.weights_dtype is None and self.autocast_dtype is None

    def step_context(self) -> AbstractContextManager[object]:
        """Return the context in which a step runs; tensors that it creates have the weights' type."""
        if self.autocast_dtype is not None:
            return torch.autocast(self.device_type, dtype=self.autocast_dtype)
        return self.around_making()

    def around_making(self) -> AbstractContextManager[object]:
        """Return the context in which weights are created in their type."""
        return nullcontext() if self.weights_dtype is None else _default_dtype(self.weights_dtype)


def build_precision(
    name: PrecisionName, device: torch.device, *, build_scaler: Callable[[torch.device], torch.amp.GradScaler]
) -> Precision:
    """Return the precision of this name on a device.

    "16-mixed" includes a gradient scaler, because float16 gradients underflow.
    """
    return Precision(
        weights_dtype=_TRUE.get(name),
        autocast_dtype=_MIXED.get(name),
        scaler=build_scaler(device) if name == "16-mixed" else None,
        device_type=device.type,
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
