"""Access to private functions of torch_xla. Worker of an XLA run.

Written against torch_xla 2.9.0.
"""

import torch_xla
from torch import Tensor

from raylit.compat.private_names import read_private

_LIBRARY = "torch_xla"


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor on the XLA device is divided over the devices; else each of them has the whole."""
    bindings = read_private(torch_xla, "_XLAC", feature="sharding on XLA", library=_LIBRARY)
    read_spec = read_private(bindings, "_get_xla_sharding_spec", feature="sharding on XLA", library=_LIBRARY)
    return "devices=" in read_spec(tensor)


def is_started_without_spmd() -> bool:
    """Return whether the process uses XLA in another way than SPMD already; switching would crash it."""
    bindings = read_private(torch_xla, "_XLAC", feature="the start of XLA", library=_LIBRARY)
    is_locked = read_private(bindings, "_xla_get_spmd_config_is_locked", feature="the start of XLA", library=_LIBRARY)
    return bool(is_locked()) and not torch_xla.runtime.is_spmd()
