"""Snapshots: a call's arguments as bytes, as they are now; later changes do not show. Worker packs, driver unpacks."""

import io
import pickle
import sys
from typing import Any

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylit.compat.wandb_media import reduce_media


def snapshot(value: Any) -> bytes:
    """Pickle with tensors detached and on the CPU, matplotlib figures without their windows, wandb's media with the
    files that they stand for. Waits for the device where there are tensors of its."""
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if (kind is Tensor or kind is nn.Parameter) and obj.layout is torch.strided and not obj.is_quantized:
            # A view's own numbers only, where torch would pickle the whole of its storage.
            dense = obj.detach().cpu().resolve_conj().resolve_neg().contiguous()
            numbers = dense.reshape(-1).view(torch.uint8).numpy()
            return _tensor, (numbers, obj.dtype, tuple(obj.shape), kind is nn.Parameter)
        figures = sys.modules.get("matplotlib.figure")
        if figures is not None and isinstance(obj, figures.Figure):
            return _windowless(obj)
        if (reduced := reduce_media(obj)) is not None:
            return reduced
        return super().reducer_override(obj)


def _tensor(numbers: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...], is_parameter: bool) -> Tensor:
    tensor = torch.from_numpy(numbers).view(dtype).reshape(shape)
    return nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _windowless(figure: Any) -> Any:
    """One that pyplot shows would open a window of its own where it is unpickled."""
    function, arguments, state, *_ = figure.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    return function, arguments, {name: part for name, part in state.items() if name != "_restore_to_pylab"}
