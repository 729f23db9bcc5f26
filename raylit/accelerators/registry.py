"""Registry of accelerators for `Trainer(accelerator=...)`. Driver."""

import importlib
import importlib.util
from collections.abc import Callable

from raylit.accelerators.base import Accelerator
from raylit.accelerators.cpu import CPUAccelerator
from raylit.accelerators.cuda import CUDAAccelerator
from raylit.accelerators.tpu_slices import has_tpu_chips
from raylit.errors import ConfigError


def _create_xla() -> Accelerator:
    """Create the accelerator of torch_xla, which its module imports."""
    return _create_from("raylit.accelerators.xla", "XLAAccelerator")


def _create_torch_tpu() -> Accelerator:
    """Create the accelerator of TorchTPU."""
    return _create_from("raylit.accelerators.torch_tpu", "TorchTPUAccelerator")


def _create_tpu() -> Accelerator:
    """Create TorchTPU's accelerator if its package is installed, or else that of torch_xla.

    Raises:
        ConfigError: Neither is installed.
    """
    if is_package_installed("torch_tpu"):
        return _create_torch_tpu()
    if is_package_installed("torch_xla"):
        return _create_xla()
    raise ConfigError(
        "TPUs are asked for, but neither torch_tpu nor torch_xla is installed: pip install 'raylit[tpu]' (TorchTPU; "
        "needs Python 3.12 or newer) or 'raylit[xla]' (torch_xla; needs the torch of its own version), here and on the "
        "TPU hosts"
    )


def _create_from(module: str, class_name: str) -> Accelerator:
    # Its module, and the package that drives the device, are imported only if it is asked for.
    accelerator: Accelerator = getattr(importlib.import_module(module), class_name)()
    return accelerator


_BUILT_IN: dict[str, Callable[[], Accelerator]] = {
    "cpu": CPUAccelerator,
    "gpu": CUDAAccelerator,
    "cuda": CUDAAccelerator,
    "tpu": _create_tpu,
    "xla": _create_xla,
    "torch_tpu": _create_torch_tpu,
}
_REGISTERED: dict[str, Callable[[], Accelerator]] = {}


def register_accelerator(name: str, factory: Callable[[], Accelerator]) -> None:
    """Register an accelerator in this process: `Trainer(accelerator=name)` then uses what `factory()` returns.

    Workers need no registration: the accelerator is pickled to them with the run. A later registration of the same name
    replaces it.

    Args:
        name: Any but "auto" and those of raylit's own accelerators.
        factory: An Accelerator's class, or a function; called once for each Trainer.

    Raises:
        ConfigError: `name` is taken.

    Example:
        class MyAccelerator(raylit.Accelerator): ...

        raylit.register_accelerator("mine", MyAccelerator)
        raylit.Trainer(accelerator="mine", num_workers=4)
    """
    if name == "auto" or name in _BUILT_IN:
        raise ConfigError(f"register_accelerator({name!r}): the name is raylit's own, choose another one")
    _REGISTERED[name] = factory


def is_registered(name: str) -> bool:
    """Return True if an accelerator has been registered under this name."""
    return name in _REGISTERED


def get_accelerator(name: str) -> Accelerator:
    """Create the accelerator of this name. ConfigError: there is none; the error lists the known names."""
    factories = {**_BUILT_IN, **_REGISTERED}
    if name not in factories:
        *names, last = map(repr, ("auto", *factories))
        raise ConfigError(f"accelerator={name!r}: must be {', '.join(names)} or {last}")
    accelerator = factories[name]()
    if not isinstance(accelerator, Accelerator):
        raise ConfigError(f"accelerator={name!r}: its factory returned {accelerator!r}, which is no raylit.Accelerator")
    return accelerator


def choose_accelerator() -> Accelerator:
    """Create the first automatic accelerator that is available here, or else the CPU's.

    A package for TPUs is imported only if this machine has the device files of TPU chips.
    """
    names = ["cuda", *_REGISTERED]
    if has_tpu_chips() and any(map(is_package_installed, ("torch_tpu", "torch_xla"))):
        names.insert(0, "tpu")
    candidates = map(get_accelerator, names)
    return next((each for each in candidates if each.is_automatic and each.is_available()), CPUAccelerator())


def is_package_installed(name: str) -> bool:
    """Return True if a package can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None
