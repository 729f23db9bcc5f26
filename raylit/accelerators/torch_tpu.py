"""TorchTPUAccelerator: one TPU chip for each worker, by the package torch_tpu. Driver and worker.

Written from the documentation and the source of torch_tpu 0.2.0, and tested against a stand-in for it: it has not been
run on TPU hardware. `torch.accelerator` does here what `torch.cuda` does for GPUs, as torch_tpu refuses calls of its
own functions of the same names.
"""

import copy
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import Self

from raylit.accelerators.base import Accelerator
from raylit.accelerators.tpu_slices import TPUPlace, has_tpu_chips
from raylit.errors import ConfigError
from raylit.storage import absolute, is_url, join

_DEVICE_TYPE = "tpu"
_MASTER_PORT = 29500
"""torch_tpu wants a number; the ranks meet in the driver's store."""
_SLICE_BUILDER_PORT = 8471
"""First port on each host on which the processes of a slice find each other."""
_CACHE_NAME = "raylit"
"""Directory below /dev/shm/torch_tpu_cache with compiled programs of this host's workers."""
_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|ran out of memory|out of memory", re.IGNORECASE)
_DEVICE_FAILURE = re.compile(r"\b(TPU|PJRT|PjRt|libtpu|XLA)\b")


class TorchTPUAccelerator(Accelerator):
    """A TPU chip that torch reaches as device "tpu"; each worker has one, as with GPUs.

    Importing torch loads torch_tpu, which reads the process's place in the slice from the environment then.
    """

    name = "torch_tpu"
    collective_backend = "cpu:gloo,tpu:tpu_dist"
    resources: Mapping[str, float] = {"TPU": 1.0}
    half_precision = "bf16-mixed"
    is_automatic = True
    is_on_tpu = True

    def __init__(self, *, compilation_cache: str | None = None) -> None:
        """Create the accelerator.

        Args:
            compilation_cache: Directory or gs:// URL in which compiled programs stay for later workers and runs. None:
                the Trainer uses a directory in its `default_root_dir`.
        """
        self.compilation_cache = compilation_cache

    def is_available(self) -> bool:
        # Workers load torch_tpu where the driver's process has been told not to.
        return has_tpu_chips() or (_is_loaded() and torch.accelerator.is_available())

    def explain_unavailable(self) -> str:
        return (
            "accelerator='torch_tpu' is asked for, but this machine has no TPU chips: connect to a cluster with TPU "
            "hosts (ray.init(address=...) or RAY_ADDRESS), or use accelerator='cpu'"
        )

    def num_devices(self) -> int:
        return torch.accelerator.device_count() if _is_loaded() else 0

    def check_settings(
        self, *, precision: str, num_workers: int, is_compiling: bool, is_syncing_batchnorm: bool
    ) -> None:
        if precision == "16-mixed":
            raise ConfigError(
                f"precision='16-mixed' with accelerator={self.name!r}: TPUs compute in bfloat16, so use 'bf16-mixed'"
            )

    def with_storage(self, directory: str) -> Self:
        # torch_tpu keeps programs in directories and Google's buckets.
        if self.compilation_cache is not None or (is_url(directory) and not directory.startswith("gs://")):
            return self
        changed = copy.copy(self)
        changed.compilation_cache = absolute(join(directory, "torch_tpu_cache"))
        return changed

    def process_variables(self, place: TPUPlace | None) -> Mapping[str, str]:
        if _is_in_use():
            raise ConfigError(
                "the driver's process has used the TPU, whose chips the workers need: use num_workers=0, or start the "
                "program with TORCH_DEVICE_BACKEND_AUTOLOAD=0, which keeps torch_tpu out of the driver"
            )
        caches = {"TORCH_TPU_TIER2_COMPILATION_CACHE": _CACHE_NAME}
        if self.compilation_cache is not None:
            caches["TORCH_TPU_TIER3_COMPILATION_CACHE_ROOT"] = self.compilation_cache
        return {
            # The user may have kept torch_tpu out of the driver.
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
            **{name: os.environ.get(name, value) for name, value in caches.items()},
            **({} if place is None else _describe_place(place)),
        }

    def device(self) -> torch.device:
        # Each process sees its own chip only.
        return torch.device(_DEVICE_TYPE, 0)

    def seed(self, seed: int) -> None:
        torch.get_device_module(_DEVICE_TYPE).manual_seed(seed)

    def random_state(self) -> Any | None:
        return self._generator().get_state() if _is_in_use() else None

    def set_random_state(self, state: Any) -> None:
        self._generator().set_state(state)

    def _generator(self) -> torch.Generator:
        generators = torch.get_device_module(_DEVICE_TYPE).default_generators
        generator: torch.Generator = generators[torch.accelerator.current_device_index()]
        return generator

    def synchronize(self) -> None:
        torch.accelerator.synchronize()

    def memory_stats(self) -> Mapping[str, float]:
        return dict(torch.accelerator.memory_stats())

    def reset_peak_memory(self) -> None:
        torch.accelerator.reset_peak_memory_stats()

    def peak_memory_bytes(self) -> int | None:
        return torch.accelerator.max_memory_allocated()

    def allocated_bytes(self) -> int:
        return torch.accelerator.memory_allocated() if _is_in_use() else 0

    def empty_cache(self) -> None:
        if _is_in_use():
            torch.accelerator.empty_cache()

    def is_out_of_memory(self, error: BaseException) -> bool:
        is_tpu_error = isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
        return is_tpu_error or super().is_out_of_memory(error)

    def is_device_failure(self, error: BaseException) -> bool:
        return isinstance(error, RuntimeError) and bool(_DEVICE_FAILURE.search(str(error)))


def _describe_place(place: TPUPlace) -> dict[str, str]:
    """Return the variables from which torch_tpu builds the slice; the lists are those of the worker's own slice."""
    slices = place.slices
    sizes = slices.topology.split("x")
    sizes += ["1"] * (3 - len(sizes))
    if slices.devices_per_chip > 1:
        sizes.append(str(slices.devices_per_chip))
    addresses = [
        f"{place.host_ips[rank]}:{_SLICE_BUILDER_PORT + rank % place.local_world_size}" for rank in place.slice_ranks
    ]
    return {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "MASTER_ADDR": place.host_ips[0],
        "MASTER_PORT": str(_MASTER_PORT),
        "TORCH_TPU_SLICEBUILDER_ADDRESSES": ",".join(addresses),
        "TORCH_TPU_TOPOLOGY": ",".join(sizes),
        "TORCH_TPU_DEVICES_PER_HOST": str(place.local_world_size),
    }


def _is_loaded() -> bool:
    """Return True if torch_tpu has registered its device with torch, which it does where there are chips."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == _DEVICE_TYPE


def _is_in_use() -> bool:
    """Return True if this process has used the device; asking for its state would start it."""
    return _is_loaded() and bool(torch.get_device_module(_DEVICE_TYPE).is_initialized())
