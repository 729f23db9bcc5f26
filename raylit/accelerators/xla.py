"""XLAAccelerator: all devices of a host, driven by one worker through torch_xla's SPMD. Driver and worker.

Import this module lazily, by `get_accelerator("xla")`: it needs torch_xla, which few installations have.
"""

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as xla_metrics
import torch_xla.distributed.spmd as spmd
import torch_xla.runtime as runtime
from torch import Tensor

from raylit.accelerators.base import Accelerator
from raylit.accelerators.transfer import map_tensors, to_device
from raylit.compat.xla import is_sharded, is_started_without_spmd
from raylit.errors import ConfigError

DATA_AXIS = "data"
"""The mesh's only axis: batches are divided along it and, with strategy="fsdp", parameters."""
_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|Out of memory", re.IGNORECASE)
_AUTOGRAD_STARTED = "device_ready_queues_"
"""Part of torch's error for a backward pass on a device that autograd's threads have been started without."""
_START = "raylit.accelerators.get_accelerator('xla').device()"
_NUM_WARM_UP_STEPS = 3
"""Steps that may compile: the first, the second (whose optimizer has a state) and one more for what hooks add."""
_MAX_UNEXPLAINED = 8
"""Compilations after the warm-up, with shapes that were there before, until they are worth a warning."""


class XLAAccelerator(Accelerator):
    """All devices of a host as one: each batch is divided over them, and each optimizer step is one compiled graph.

    A worker's loader yields the batches of all devices of its host together. Nothing of XLA is started before the
    worker asks for `device`, so that the driver never takes a TPU's chips.
    """

    name = "xla"
    collective_backend = "gloo"
    is_automatic = True
    half_precision = "bf16-mixed"
    is_on_tpu = True
    is_spmd = True
    has_static_shapes = True
    has_storages = False

    # Driver

    def is_available(self) -> bool:
        return "PJRT_DEVICE" in os.environ or _has_tpu()

    def explain_unavailable(self) -> str:
        return (
            f"accelerator={self.name!r} is asked for, but this machine has no TPU and PJRT_DEVICE is not set: connect "
            "to a cluster with TPUs (ray.init(address=...) or RAY_ADDRESS), use accelerator='cpu', or set "
            "PJRT_DEVICE=CPU before Python starts for XLA's CPU device (CPU_NUM_DEVICES: how many)"
        )

    def num_devices(self) -> int:
        """Return 1: one worker drives all devices of a host."""
        return 1

    def check_settings(
        self, *, precision: str, num_workers: int, is_compiling: bool, is_syncing_batchnorm: bool
    ) -> None:
        if precision == "16-mixed":
            raise ConfigError(
                f"precision='16-mixed' with accelerator={self.name!r}: XLA has no gradient scaler that keeps its graph "
                "whole; use 'bf16-mixed', which needs none"
            )
        if is_compiling:
            raise ConfigError(
                f"compile with accelerator={self.name!r}: XLA compiles each step as a whole already; leave it out"
            )
        if is_syncing_batchnorm and num_workers > 1 and os.environ.get("PJRT_DEVICE") == "CPU":
            raise ConfigError(
                f"sync_batchnorm=True with num_workers={num_workers} on XLA's CPU device, whose processes form no "
                "common XLA world: use one worker, whose devices share the statistics anyway"
            )

    # Worker

    def device(self) -> torch.device:
        return _start_runtime().device

    def set_up(self, *, num_threads: int | None) -> None:
        super().set_up(num_threads=num_threads)
        _start_runtime().watch = _CompilationWatch()
        # torch's generator does not reach XLA: derive the seed from its state, without drawing from it.
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())
        self.seed(int(torch.randint(2**31, (), generator=generator)))

    @property
    def is_one_graph(self) -> bool:
        return is_one_world()

    def seed(self, seed: int) -> None:
        _start_runtime()
        torch_xla.manual_seed(seed % 2**31)

    def random_state(self) -> Any | None:
        return xm.get_rng_state() if _is_started() else None

    def set_random_state(self, state: Any) -> None:
        _start_runtime()
        xm.set_rng_state(int(state))

    def synchronize(self) -> None:
        torch_xla.sync()
        xm.wait_device_ops()

    def place_batch(self, batch: Any, *, is_same_on_all_ranks: bool = False) -> Any:
        """Copy the batch to the devices, each tensor divided along its first dimension."""
        started = _start_runtime()
        started.watch.note_batch(batch)
        is_part = is_one_world() and not is_same_on_all_ranks
        return map_tensors(batch, functools.partial(started.place_tensor, is_part=is_part), on_movable=_move)

    def after_step(self) -> None:
        before = count_compilations()
        torch_xla.sync()
        _start_runtime().watch.note_step(count_compilations() - before)

    def after_evaluation_batch(self) -> None:
        torch_xla.sync()

    def is_out_of_memory(self, error: BaseException) -> bool:
        is_xla_error = isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
        return is_xla_error or super().is_out_of_memory(error)


def count_compilations() -> int:
    """Return the number of graphs that XLA has compiled in this process."""
    return int(xla_metrics.counter_value("UncachedCompile") or 0)


def is_one_world() -> bool:
    """Return whether the compiled graph spans all workers, as on TPU hosts; on XLA's CPU device each has its own."""
    return runtime.process_count() > 1


def shard_tensor(tensor: Tensor, dimension: int) -> None:
    """Divide a tensor on the XLA device over the devices, along one of its dimensions, in place."""
    spmd.mark_sharding(tensor, _start_runtime().mesh, _name_axes(tensor.ndim, dimension))


def num_shards() -> int:
    """Return the number of devices that the worker's graph runs on."""
    return int(runtime.global_runtime_device_count())


def _name_axes(num_dims: int, dimension: int) -> tuple[str | None, ...]:
    return tuple(DATA_AXIS if index == dimension else None for index in range(num_dims))


class _Runtime:
    """XLA in this process: the device that stands for all, the mesh of them, and what has been compiled."""

    def __init__(self) -> None:
        self.device: torch.device = torch_xla.device()
        num_devices = num_shards()
        self.mesh = spmd.Mesh(np.arange(num_devices), (num_devices,), (DATA_AXIS,))
        self.watch = _CompilationWatch()
        self._specs: dict[tuple[int, bool], spmd.ShardingSpec] = {}
        """By number of dimensions and `is_part`; building one takes as long as half of a copy."""

    def place_tensor(self, tensor: Tensor, *, is_part: bool) -> Tensor:
        """Divide a tensor over the devices; with `is_part` it is this process's part of a tensor over all processes."""
        if tensor.ndim == 0:
            return tensor.to(self.device)
        if tensor.device.type == "xla":  # a transfer hook has copied it, to each device as a whole
            if is_sharded(tensor):
                return tensor
            if not is_part:
                spmd.mark_sharding(tensor, self.mesh, _name_axes(tensor.ndim, 0))
                return tensor
            tensor = tensor.cpu()
        spec = self._specs.get((tensor.ndim, is_part))
        if spec is None:
            spec = spmd.ShardingSpec(self.mesh, _name_axes(tensor.ndim, 0), minibatch=is_part)
            self._specs[tensor.ndim, is_part] = spec
        [placed] = xm.send_cpu_data_to_device([tensor.contiguous()], self.device, spec)
        return placed


@functools.cache
def _start_runtime() -> _Runtime:
    """Start XLA in this process, once.

    Raises:
        ConfigError: There is no device, or a backward pass has run in this process before.
    """
    if "PJRT_DEVICE" not in os.environ:
        if not _has_tpu():
            raise ConfigError(XLAAccelerator().explain_unavailable())
        os.environ["PJRT_DEVICE"] = "TPU"
    if is_started_without_spmd():
        raise ConfigError(
            "torch_xla has been used in this process before, without SPMD, which cannot be switched on later: leave "
            f"that out, or put this in front of it: {_START}"
        )
    # `use_spmd` sets it, and warns where it is set, as in an actor of a driver that has called it.
    os.environ.pop("XLA_USE_SPMD", None)
    runtime.use_spmd()
    runtime.global_runtime_device_count()  # starts it, which `torch_xla.device()` alone puts off
    started = _Runtime()
    try:
        torch.zeros(1, device=started.device, requires_grad=True).sum().backward()
    except RuntimeError as error:
        if _AUTOGRAD_STARTED not in str(error):
            raise
        raise ConfigError(
            "a backward pass has run in this process before XLA was started, and torch cannot run one on XLA any more: "
            f"give the work to another process (num_workers=1), or put this at the start of the script: {_START}"
        ) from error
    torch_xla.sync()
    return started


def _is_started() -> bool:
    return _start_runtime.cache_info().currsize > 0


def _has_tpu() -> bool:
    with contextlib.suppress(Exception):  # it reads the PCI bus
        return int(runtime.tpu.num_available_chips()) > 0
    return False


def _move(value: Any) -> Any:
    return to_device(value, _start_runtime().device)


_Shapes = tuple[tuple[int, ...], ...]


class _CompilationWatch:
    """Warns of optimizer steps that compile after the warm-up, once for each shape of batch."""

    def __init__(self) -> None:
        self._shapes: _Shapes = ()
        self._known: set[_Shapes] = set()
        self._num_steps = 0
        self._num_unexplained = 0

    def note_batch(self, batch: Any) -> None:
        shapes: list[tuple[int, ...]] = []

        def note(tensor: Tensor) -> Tensor:
            shapes.append(tuple(tensor.shape))
            return tensor

        map_tensors(batch, note)
        self._shapes = tuple(shapes)

    def note_step(self, num_compilations: int) -> None:
        self._num_steps += 1
        is_known = self._shapes in self._known
        self._known.add(self._shapes)
        if num_compilations == 0 or self._num_steps <= _NUM_WARM_UP_STEPS:
            return
        if not is_known:
            warnings.warn(
                f"step {self._num_steps} was compiled anew, as its batch has the shapes {_format(self._shapes)}, which "
                "no batch before had: every new shape costs a compilation; pad the batches to one shape",
                stacklevel=2,
            )
            return
        self._num_unexplained += 1
        if self._num_unexplained == _MAX_UNEXPLAINED:
            warnings.warn(
                f"{_MAX_UNEXPLAINED} steps after the warm-up were compiled anew, the last with a batch of the shapes "
                f"{_format(self._shapes)}, which is no new one: training_step does not do the same in each step. A "
                "number that changes belongs into a tensor, a decision into torch.where",
                stacklevel=2,
            )


def _format(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes)) or "of no tensor"
