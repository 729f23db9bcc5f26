"""TorchSettings: torch's process-wide switches that change numbers or speed, as a value that travels. Both sides."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from typing_extensions import Self


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchSettings:
    """A process's switches at one moment."""

    dtype: torch.dtype
    """Of new floating-point tensors."""
    matmul_precision: str
    """Of float32 products: torch.set_float32_matmul_precision."""
    float32_precisions: tuple[str, ...]
    """Of each operation in `_operations`: torch's newer switch for the same thing and more."""
    deterministic: bool | Literal["warn"]
    is_cudnn_deterministic: bool
    benchmark: bool
    """cuDNN tries its kernels and takes the fastest."""

    @classmethod
    def current(cls) -> Self:
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        is_warning = torch.is_deterministic_algorithms_warn_only_enabled()
        return cls(
            dtype=torch.get_default_dtype(),
            matmul_precision=torch.get_float32_matmul_precision(),
            float32_precisions=tuple(operation.fp32_precision for operation in _operations()),
            deterministic="warn" if is_deterministic and is_warning else is_deterministic,
            is_cudnn_deterministic=torch.backends.cudnn.deterministic,
            benchmark=torch.backends.cudnn.benchmark,
        )

    def apply(self) -> None:
        """Set what is otherwise here, and nothing else: some switches warn when they are touched, and that of
        determinism imports torch's compiler, which takes seconds."""
        present = self.current()
        torch.set_default_dtype(self.dtype)
        set_matmul_precision(self.matmul_precision)
        for operation, precision in zip(_operations(), self.float32_precisions, strict=True):
            if operation.fp32_precision != precision:
                operation.fp32_precision = precision
        if present.deterministic != self.deterministic:
            torch.use_deterministic_algorithms(bool(self.deterministic), warn_only=self.deterministic == "warn")
        torch.backends.cudnn.deterministic = self.is_cudnn_deterministic
        torch.backends.cudnn.benchmark = self.benchmark


def set_matmul_precision(precision: str) -> None:
    if torch.get_float32_matmul_precision() != precision:
        torch.set_float32_matmul_precision(precision)


def _operations() -> tuple[Any, ...]:
    """From the general to the special, which is to have the last word."""
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return (backends, cudnn, backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
