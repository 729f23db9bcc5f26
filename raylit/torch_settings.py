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
    reduced_precision: tuple[bool, ...]
    """Whether products of half precision may be summed up in it, by type in `_REDUCED`."""
    attention: tuple[bool, ...]
    """Which of `_ATTENTION` scaled dot product attention may choose from."""
    libraries: tuple[bool, ...]
    """Which of cuDNN and oneDNN torch may use."""
    sharing_strategy: str
    """How tensors go from a DataLoader's processes to this one: torch.multiprocessing.set_sharing_strategy."""

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
            reduced_precision=tuple(getattr(torch.backends.cuda.matmul, name) for name in _REDUCED),
            attention=tuple(getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in _ATTENTION),
            libraries=tuple(library.enabled for library in _libraries()),
            sharing_strategy=torch.multiprocessing.get_sharing_strategy(),
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
        if present.reduced_precision != self.reduced_precision:
            for name, is_allowed in zip(_REDUCED, self.reduced_precision, strict=True):
                setattr(torch.backends.cuda.matmul, name, is_allowed)
        if present.attention != self.attention:
            for name, is_enabled in zip(_ATTENTION, self.attention, strict=True):
                getattr(torch.backends.cuda, f"enable_{name}_sdp")(is_enabled)
        if present.libraries != self.libraries:
            for library, is_enabled in zip(_libraries(), self.libraries, strict=True):
                library.enabled = is_enabled
        if present.sharing_strategy != self.sharing_strategy:
            torch.multiprocessing.set_sharing_strategy(self.sharing_strategy)


_REDUCED = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")


def set_matmul_precision(precision: str) -> None:
    if torch.get_float32_matmul_precision() != precision:
        torch.set_float32_matmul_precision(precision)


def _libraries() -> tuple[Any, ...]:
    return torch.backends.cudnn, torch.backends.mkldnn


def _operations() -> tuple[Any, ...]:
    """From the general to the special, which is to have the last word."""
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return (backends, cudnn, backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
